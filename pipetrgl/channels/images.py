"""Images on links: where a later stage's objective needs the image, it rides beside the activation, in training only.

loader: image ─▶ stage 0 ═ activation, image ═▶ stage 1 ═ activation, image ═▶ stage 2 ═ activation ═▶ stage 3, the last
"""

from __future__ import annotations

from typing import final

import torch

from pipetrgl.channels.contracts import Outbox
from pipetrgl.microbatch import MicroBatch


@final
class ImageOutbox:
    """An outbox that sends a copy of the image on, or leaves it behind.

    A copy, for what came in lies in a slot that is used again while this link may still read it.

    Args:
        outbox: wrapped.
        device: of the link.
        wanted: whether the receiver needs images.
    """

    def __init__(self, outbox: Outbox, device: torch.device, wanted: bool) -> None:
        self._outbox = outbox
        self._device = device
        self._wanted = wanted

    @property
    def waited_s(self) -> float:
        return self._outbox.waited_s

    @property
    def sent_bytes(self) -> int:
        return self._outbox.sent_bytes

    @property
    def received_index(self) -> int:
        return self._outbox.received_index

    def send(self, micro_batch: MicroBatch) -> None:
        if (image := micro_batch.image) is not None:
            micro_batch = micro_batch.beside(image.to(self._device, copy=True) if self._wanted else None)
        self._outbox.send(micro_batch)

    def close(self) -> None:
        self._outbox.close()
