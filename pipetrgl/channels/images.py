"""Images on links: where a later stage's objective needs the image, it rides beside the activation, in training only.

loader: image ─▶ stage 0 ═ activation, image ═▶ stage 1 ═ activation, image ═▶ stage 2 ═ activation ═▶ stage 3, the last
"""

from __future__ import annotations

import torch

from pipetrgl.channels.changing import ChangingOutbox
from pipetrgl.channels.contracts import Outbox
from pipetrgl.microbatch import MicroBatch


def image_outbox(outbox: Outbox, device: torch.device, wanted: bool) -> Outbox:
    """An outbox that sends a copy of the image on, or leaves it behind.

    A copy, for what came in lies in a slot that is used again while this link may still read it.

    Args:
        outbox: wrapped.
        device: of the link.
        wanted: whether the receiver needs images.
    """

    def change(micro_batch: MicroBatch) -> MicroBatch:
        if (image := micro_batch.image) is None:
            return micro_batch
        return micro_batch.beside(image.to(device, copy=True) if wanted else None)

    return ChangingOutbox(outbox, change)
