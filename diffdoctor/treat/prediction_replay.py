"""Make a pipeline's prediction again, from other latents: with the very inputs that the pipeline gave its denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.families import Family

_SAMPLE_NAMES = ("hidden_states", "sample")
# Positions of tokens and sizes, which hold for every picture of the batch.
_SHARED_NAMES = ("img_ids", "txt_ids", "position_ids", "img_shapes")


@dataclass
class _Call:
    module: torch.nn.Module
    args: tuple
    kwargs: dict
    name: str | None
    parts: int


@dataclass
class _Step:
    batch: int
    calls: list[_Call]
    weight: torch.Tensor | None


class Predictor:
    """Watches a denoiser inside a pipeline's own loop, and repeats the prediction of a step that was watched.

    Classifier-free guidance is recognised by its two predictions, whether they came from one call or from two: how the
    scheduler's prediction is made of them is read off per picture, by the family's `weight_of`.

    Args:
        family: of the pipeline; a hook stands on each of its denoisers until `close`.
    """

    def __init__(self, family: Family):
        self._family = family
        self._steps: dict[int, _Step] = {}
        self._seen: list[tuple] = []
        self._watching = True
        self._handles = [d.register_forward_hook(self._watch, with_kwargs=True) for d in family.denoisers]

    def close(self) -> None:
        """Take the hook away and forget everything."""
        for handle in self._handles:
            handle.remove()
        self.forget()
        self._seen.clear()

    def forget(self) -> None:
        """Before another run's first `keep`: forget the steps of the last one."""
        self._steps.clear()

    def _watch(self, module, args, kwargs, output):
        if self._watching:
            self._seen.append((module, args, dict(kwargs), self._prediction(output)))

    def _prediction(self, output) -> torch.Tensor:
        return self._family.from_denoiser(output[0] if isinstance(output, tuple) else output.sample)

    def keep(self, step: int, prediction: torch.Tensor) -> None:
        """Store how the prediction that the scheduler receives at this step was made.

        Args:
            step: the number under which it is kept.
            prediction: as the pipeline's loop holds it, (B, ...).

        Raises:
            UserError: when it was not made of one or two passes of the denoiser, or not of these two alone.
        """
        seen, self._seen = self._seen, []
        batch = len(prediction)
        calls, outputs = [], []
        for module, args, kwargs, output in seen:
            name = next((name for name in _SAMPLE_NAMES if name in kwargs), None)
            args, kwargs = (args if name else args[1:]), {k: v for k, v in kwargs.items() if k != name}
            calls.append(_Call(module, args, kwargs, name, max(1, len(output) // batch)))
            outputs += output.chunk(calls[-1].parts)
        if len(outputs) not in (1, 2):
            what = f"a prediction made of 1 or 2 passes of {type(self._family.denoiser).__name__}"
            raise UserError(expected("guide", what, f"{len(outputs)}; rewinds=0 does without repeating it"))
        weight = None
        if len(outputs) == 2:
            weight = self._family.weight_of(*outputs, prediction)
            again = self._family.recombine(*(output.float() for output in outputs), weight)
            if _is_another(again, prediction):
                what = f"{type(self._family.pipeline).__name__}'s predictions, guided in the plain way"
                raise UserError(expected("guide", what, "rescaled ones; rewinds=0 does without repeating them"))
        self._steps[step] = _Step(batch, calls, weight)

    @torch.no_grad()
    def predict(self, step: int, model_input: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The guided prediction (M, ...) at a watched step of another input, as the pipeline's loop holds the two.

        Args:
            step: given to `keep` before.
            model_input: (M, ...).
            rows: (M,) which pictures of the watched batch they stand for. Of the denoiser's other inputs those whose
                first dimension is the batch's are taken at these rows, all others as they are.
        """
        stored = self._steps[step]
        outputs = []
        self._watching = False
        try:
            for call in stored.calls:
                index = torch.cat([rows + part * stored.batch for part in range(call.parts)])
                count = stored.batch * call.parts
                args, kwargs = self._at_rows(call.args, index, count), self._at_rows(call.kwargs, index, count)
                inputs = self._family.to_denoiser(torch.cat([model_input] * call.parts))
                if call.name is None:
                    output = call.module(inputs, *args, **kwargs)
                else:
                    output = call.module(*args, **{call.name: inputs}, **kwargs)
                outputs += self._prediction(output).chunk(call.parts)
        finally:
            self._watching = True
        if stored.weight is None:
            return outputs[0]
        return self._family.recombine(*outputs, stored.weight[rows.to(outputs[0].device)].to(outputs[0].dtype))

    def _at_rows(self, value, index: torch.Tensor, count: int):
        if isinstance(value, torch.Tensor):
            batched = value.ndim > 0 and len(value) == count
            return value.index_select(0, index.to(value.device)) if batched else value
        if isinstance(value, dict):
            return {k: v if k in _SHARED_NAMES else self._at_rows(v, index, count) for k, v in value.items()}
        if self._family.denoiser_takes_lists and isinstance(value, list) and len(value) == count:
            return [value[row] for row in index.tolist()]
        if isinstance(value, (list, tuple)):
            return type(value)(self._at_rows(entry, index, count) for entry in value)
        return value


def _is_another(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two predictions differ by more than rounding."""
    far = 1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.05
    difference, size = ((x.float().flatten(1)).norm(dim=1) for x in (found - wanted, wanted))
    return bool((difference > far * size).any())
