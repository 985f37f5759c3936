"""How an activation is written on the wire: fp32, bf16, fp16, or int8 with one scale a sample.

A codec is part of the model: the serial launcher applies `received` too, so exactness holds with any of them.
"""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

from pipetrgl.microbatch import Activation, MicroBatch


class Codec(Protocol):
    """Encodes one tensor as one or more; `code` travels in the header and is compared at start."""

    code: int
    num_parts: int

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor: ...


@final
class Cast:
    """Writes floating-point tensors as `dtype` and reads them back as float32; other tensors travel as they are."""

    num_parts = 1

    def __init__(self, code: int, dtype: torch.dtype) -> None:
        self.code = code
        self.dtype = dtype

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.to(self.dtype) if tensor.is_floating_point() else tensor,)

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        (part,) = parts
        return part.to(torch.float32) if part.is_floating_point() else part


@final
class Plain:
    """Sends the tensor itself, zero-copy, in its own dtype."""

    code = 0
    num_parts = 1

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0]


@final
class Int8:
    """Symmetric 8-bit integers with one float32 scale a sample: x ~ q * max|x| / 127."""

    code = 3
    num_parts = 2

    def encode(self, tensor: Tensor) -> tuple[Tensor, ...]:
        largest = tensor.abs().flatten(1).amax(1)
        # a sample that is not finite gets a scale that is not finite, so that the receiver sees it
        scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
        shaped = scale.view(-1, *[1] * (tensor.ndim - 1))
        return (tensor / shaped).round_().to(torch.int8), scale

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        quantised, scale = parts
        return quantised.to(torch.float32) * scale.view(-1, *[1] * (quantised.ndim - 1))


CODECS: dict[str, Codec] = {
    "fp32": Plain(),
    "bf16": Cast(1, torch.bfloat16),
    "fp16": Cast(2, torch.float16),
    "int8": Int8(),
}


def encode(codec: Codec, activation: Activation) -> tuple[Tensor, ...]:
    """All wire tensors of an activation, detached: the parts of its first tensor, then of the next."""
    tensors = activation if isinstance(activation, tuple) else (activation,)
    return tuple(
        part for tensor in tensors for part in codec.encode(tensor.detach() if tensor.requires_grad else tensor)
    )


def encoded_bytes(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Of each wire tensor of a tensor of this shape."""
    return tuple(part.nbytes for part in codec.encode(torch.empty(shape, dtype=dtype, device="meta")))


def decode(codec: Codec, parts: tuple[Tensor, ...]) -> Activation:
    """The inverse of `encode`; a single tensor comes back as itself, not as a tuple of one."""
    groups = [parts[i : i + codec.num_parts] for i in range(0, len(parts), codec.num_parts)]
    tensors = tuple(codec.decode(group) for group in groups)
    return tensors[0] if len(tensors) == 1 else tensors


def payload(codec: Codec, micro_batch: MicroBatch) -> tuple[Tensor, ...]:
    """All wire tensors of a micro-batch: those of its activation, then those of the image, if one rides along."""
    parts = encode(codec, micro_batch.activation)
    return parts if micro_batch.image is None else (*parts, *codec.encode(micro_batch.image))


def unpacked(codec: Codec, micro_batch: MicroBatch, parts: tuple[Tensor, ...], has_image: bool) -> MicroBatch:
    """The inverse of `payload`: `micro_batch` with what `parts` hold."""
    if not has_image:
        return micro_batch.carrying(decode(codec, parts))
    activation, image = parts[: -codec.num_parts], parts[-codec.num_parts :]
    return micro_batch.carrying(decode(codec, activation)).beside(codec.decode(image))


def received(codec: Codec, micro_batch: MicroBatch) -> MicroBatch:
    """What the receiver of `micro_batch` would see."""
    return unpacked(codec, micro_batch, payload(codec, micro_batch), micro_batch.image is not None)
