"""ScaledAdam: Adam whose steps are relative to the size of each parameter tensor.

The optimizer of the icefall recipes (k2-fsa/icefall, `zipformer/optim.py`; described in "Zipformer", Yao et al. 2024),
in the form that GPT-SoVITS trains stage 1 with. A tensor is thought of as direction times scale: the direction moves by
Adam steps times the tensor's root mean square, and the scale is learnt on its own, in the log domain, from the sum of
parameter times gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lastgood_sovits.errors import SovitsError

logger = logging.getLogger(__name__)

State = dict[str, Any]


class ScaledAdam(Optimizer):
    """Parameters of one dtype and shape are stepped together, as one stack.

    The state of a stack is kept with its first parameter, every tensor with the stack as leading dimension; the other
    parameters have none. This is the layout of GPT-SoVITS checkpoints, which load here and the other way round. Stacks
    are ordered by dtype and shape, members by their order in `params`, so the layout depends on nothing else. The first
    stack also keeps the history of gradient norms.

    A gradient that is missing counts as zero. Clipping scales the gradient of the scale only: the direction's Adam step
    does not depend on the gradient's size anyway.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.03,
        *,
        clipping_scale: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
    ) -> None:
        """
        `lr`: relative change of a tensor per step, roughly.
        `clipping_scale`: gradients are clipped at this multiple of the median norm of the last
        `clipping_update_period` steps; None for no clipping. Nothing is clipped in the first period.
        `scalar_lr_scale`: factor on `lr` for the scale of tensors and for parameters of one element.
        `param_min_rms`, `param_max_rms`: a tensor outside these is not shrunk, or grown, any further.
        `scalar_max`: largest magnitude that a parameter of one element may have before a step.
        `size_update_period`: steps between two updates of the scale.

        Raises SovitsError for a value that cannot work.
        """
        if lr < 0 or eps <= 0 or size_update_period < 1 or clipping_update_period < 1:
            raise SovitsError("ScaledAdam needs lr of 0 or more, eps above 0, and periods of 1 step or more.")
        if not 0 < betas[0] <= betas[1] < 1:
            raise SovitsError(f"ScaledAdam's betas are {betas}; they must satisfy 0 < beta1 <= beta2 < 1.")
        defaults = {
            "lr": lr,
            "clipping_scale": clipping_scale,
            "betas": betas,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "size_update_period": size_update_period,
            "clipping_update_period": clipping_update_period,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; `closure`, if given, computes the loss first, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stacks = _stacks(group["params"])
            grads = [_stacked_grad(members) for members in stacks]
            fresh = not self.state[stacks[0][0]]
            clip = 1.0 if fresh else self._clip_factor(group, stacks, grads)
            for members, grad in zip(stacks, grads, strict=True):
                self._step_stack(group, members, grad, clip)
        return loss

    def _clip_factor(self, group: dict[str, Any], stacks: list[list[Tensor]], grads: list[Tensor]) -> float:
        """At most 1. The norm is that of all gradients, each times its tensor's rms, since steps are relative to it."""
        if group["clipping_scale"] is None:
            return 1.0
        first: State = self.state[stacks[0][0]]
        step: int = first["step"]
        period: int = group["clipping_update_period"]
        squares = [
            torch.linalg.vector_norm(
                grad if _is_scalar(members) else grad * self.state[members[0]]["param_rms"]
            ).square()
            for members, grad in zip(stacks, grads, strict=True)
        ]
        norm = torch.stack(squares).sum().sqrt()
        if "model_norms" not in first:
            first["model_norms"] = torch.zeros(period, device=norm.device)
        first["model_norms"][step % period] = norm
        if step % period == 0:
            median = first["model_norms"].sort()[0][min(period - 1, period // 4 * 2)].item()
            first["model_norm_threshold"] = group["clipping_scale"] * median
            clipped = first.get("num_clipped", 0)
            first["num_clipped"] = 0
            logger.info(
                "step %d: median gradient norm %.3e, %d of the last %d steps were clipped",
                step,
                median,
                clipped,
                period,
            )
        if step < period or "model_norm_threshold" not in first:
            return 1.0
        factor = min(1.0, float(first["model_norm_threshold"]) / (norm.item() + 1e-20))
        if factor < 1.0:
            first["num_clipped"] = first.get("num_clipped", 0) + 1
        return factor

    def _step_stack(self, group: dict[str, Any], members: list[Tensor], grad: Tensor, clip: float) -> None:
        state: State = self.state[members[0]]
        scalar = _is_scalar(members)
        stacked = torch.stack(members)
        if not state:
            self._init_state(state, stacked, group, scalar)
        delta: Tensor = state["delta"]
        delta.mul_(group["betas"][0])
        if scalar:
            self._add_scalar_step(group, state, grad)
            limit = group["scalar_max"]
            for parameter in members:
                parameter.clamp_(-limit, limit)
        else:
            self._learn_scale(group, state, stacked, grad if clip == 1.0 else grad * clip)
            self._add_direction_step(group, state, grad)
        for parameter, change in zip(members, delta.unbind(), strict=True):
            parameter.add_(change)
        state["step"] += 1

    @staticmethod
    def _init_state(state: State, stacked: Tensor, group: dict[str, Any], scalar: bool) -> None:
        state["step"] = 0
        state["delta"] = torch.zeros_like(stacked)
        # Upstream has no scale for a lone parameter of one element, but gives an unused one to a stack of them.
        if stacked.numel() > 1:
            state["param_rms"] = _rms(stacked)
            state["scale_exp_avg_sq"] = torch.zeros_like(state["param_rms"])
            state["scale_grads"] = stacked.new_zeros(group["size_update_period"], *state["param_rms"].shape)
        state["exp_avg_sq"] = torch.zeros_like(stacked)

    @staticmethod
    def _learn_scale(group: dict[str, Any], state: State, stacked: Tensor, grad: Tensor) -> None:
        """Collects the gradient of the scale; every `size_update_period` steps, adds its step to `delta`."""
        period = state["scale_grads"].shape[0]
        phase = state["step"] % period
        state["scale_grads"][phase] = (stacked * grad).sum(dim=_member_dims(stacked), keepdim=True)
        if phase != period - 1:
            return
        rms: Tensor = state["param_rms"]
        rms.copy_(_rms(stacked))
        if state["step"] == 0:
            return
        beta1, beta2 = group["betas"]
        decay = beta2**period
        size_lr = group["lr"] * group["scalar_lr_scale"]
        grads: Tensor = state["scale_grads"]
        second: Tensor = state["scale_exp_avg_sq"]
        second.mul_(decay).add_(grads.square().mean(dim=0), alpha=1 - decay)
        correction = 1 - decay ** ((state["step"] + 1) // period)
        change = grads.sum(dim=0).mul_(-size_lr * correction**0.5).div_(second.sqrt() + group["eps"])
        change.masked_fill_(rms < group["param_min_rms"], 0.0)
        change.masked_fill_(rms > group["param_max_rms"], -size_lr * period)
        state["delta"].add_(stacked * change, alpha=1 - beta1)

    @staticmethod
    def _add_direction_step(group: dict[str, Any], state: State, grad: Tensor) -> None:
        beta1, beta2 = group["betas"]
        second: Tensor = state["exp_avg_sq"]
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta2 ** (state["step"] + 1)
        # The correction is dropped when it is nearly 1, as in the original.
        denominator = (second / correction).sqrt_() if correction < 0.99 else second.sqrt()
        size = state["param_rms"].clamp(min=group["param_min_rms"]).mul_(-group["lr"] * (1 - beta1))
        state["delta"].add_(grad.div(denominator.add_(group["eps"])).mul_(size))

    @staticmethod
    def _add_scalar_step(group: dict[str, Any], state: State, grad: Tensor) -> None:
        """A parameter of one element has no rms to speak of: plain Adam, with a lower rate."""
        beta1, beta2 = group["betas"]
        second: Tensor = state["exp_avg_sq"]
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta2 ** (state["step"] + 1)
        lr = group["lr"] * group["scalar_lr_scale"]
        state["delta"].addcdiv_(grad, (second / correction).sqrt_().add_(group["eps"]), value=-lr * (1 - beta1))


def _stacks(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters grouped by dtype and shape, in the order of these."""
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((str(parameter.dtype), *parameter.shape), []).append(parameter)
    return [groups[key] for key in sorted(groups)]


def _stacked_grad(members: list[Tensor]) -> Tensor:
    return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in members])


def _is_scalar(members: list[Tensor]) -> bool:
    return members[0].numel() == 1


def _member_dims(stacked: Tensor) -> list[int]:
    return list(range(1, stacked.ndim))


def _rms(stacked: Tensor) -> Tensor:
    """Root mean square of every member, with the stack's number of dimensions."""
    return stacked.square().mean(dim=_member_dims(stacked), keepdim=True).sqrt()
