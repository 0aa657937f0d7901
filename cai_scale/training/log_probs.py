"""Log-probabilities of given tokens, without the logits of a batch in memory.

TRL's fused head does that for GPUs. Elsewhere it takes every position, padding and prompts among
them, and forms the logits once for the loss and again for its gradient. Where the head is frozen,
as under LoRA, the gradient of a log-probability is known as soon as the logits are:
d log p(y) / dh = w_y - Σ_v p_v w_v. It is kept, [tokens, hidden], and nothing is formed twice.
"""

from typing import Any

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.trainer import utils

CHUNK = 128  # tokens whose logits exist at once; so many fit a processor's cache


def install() -> None:
    """Let TRL's fused head take only the positions with a label, and `FrozenHead` where it can."""
    utils._use_triton = lambda device: True
    utils._ChunkedLogProbFunction = FusedHead


def log_probs(states: Tensor, head: Any, labels: Tensor) -> Tensor:
    """log p(label) of each token, [tokens], fp32.

    Args:
        states: [tokens, hidden], of the positions that predict.
        head: the model's output embeddings.
        labels: [tokens], int64.
    """
    with utils.maybe_gather_lm_head_ctx(head.weight, head.bias):
        found: Tensor = FusedHead.apply(states, head.weight, head.bias, labels)[0]
        return found


class FusedHead:
    """Stands where TRL has its function, and calls one of two."""

    @staticmethod
    def apply(
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float = 1.0,
        chunk: int = 2**15,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """log p, entropy, log Σp², mean logit, and whether the label is the likeliest token:
        [tokens] each, None for what is not asked for."""
        plain = bias is None and softcap is None and "log_sum_sq_probs" not in outputs
        if states.is_cuda or weight.requires_grad or not plain:
            every: tuple[Tensor | None, ...] = ChunkedLogProbFunction.apply(
                states, weight, bias, labels, temperature, chunk, softcap, scale, outputs
            )
            return every
        log_prob, entropy, mean, top = FrozenHead.apply(states, weight, labels, scale / temperature)
        asked = {"entropy": entropy, "mean_logits": mean, "is_top1": top}
        return log_prob, *(asked.get(n) if n in outputs else None for n in OPTIONAL_OUTPUTS)


class FrozenHead(torch.autograd.Function):
    """softmax(scale · states · weightᵀ), and its gradient with respect to the states alone.

    Only log p has a gradient; TRL's entropy has one too, which no loss here uses.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p, entropy, mean logit, fp32, and whether the label is the likeliest: [tokens]."""
        kind = states.device.type
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else states.dtype
        ctx.kept_dtype, wanted = states.dtype, ctx.needs_input_grad[0]
        states, weight = states.to(dtype), weight.to(dtype)
        gradient = torch.empty_like(states) if wanted else None
        log_prob, entropy = states.new_empty(2, len(labels), dtype=torch.float32)
        top = torch.empty_like(labels, dtype=torch.bool)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(labels), CHUNK):
                part = slice(start, start + CHUNK)
                # In place from here: a pass over the vocabulary costs as much as it reads.
                logits = (states[part] @ weight.t()).float().mul_(scale)
                own = labels[part, None]
                highest = logits.amax(1, keepdim=True)
                logit = logits.sub_(highest).gather(1, own)[:, 0]
                top[part] = logit >= 0
                weights = logits.exp()
                total = weights.sum(1)
                log_prob[part] = logit - total.log()
                entropy[part] = total.log() - torch.linalg.vecdot(weights, logits) / total
                if gradient is not None:
                    share = weights.div_(-total[:, None])
                    share.scatter_add_(1, own, torch.ones_like(share[:, :1]))
                    gradient[part] = share.mul_(scale).to(dtype) @ weight
            mean = states.float() @ weight.float().mean(0) * scale
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy, mean, top)
        return log_prob, entropy, mean, top

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (kept * gradient[:, None]).to(ctx.kept_dtype), None, None, None
