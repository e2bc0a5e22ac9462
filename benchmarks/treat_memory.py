"""What a treatment step keeps for backward and how long it takes: `python -m benchmarks.treat_memory`.

The first table runs the demo's pipeline: `full` (every one of 10 steps in the graph) against `draft_k` (3 of 10), with
each option that saves memory. The second gives the same for networks of a real size, without their weights: shapes
alone go through them (meta tensors), so it has bytes and operations but no seconds.

kept: bytes of distinct storages saved for backward at the worst moment, parameters left out.
peak: the most bytes of new tensors alive at any moment of replay and backward, what backward recomputes included.
time: of a whole step: roll-out, diagnosis, replay and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdoctor.demo.pipeline import build_pipeline
from diffdoctor.detector import ArtifactDetector
from diffdoctor.treat import TreatConfig
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora, merged_lora
from diffdoctor.treat.methods import kept_steps
from diffdoctor.treat.preparing import memory_options
from diffdoctor.treat.rollout import Guidance, initial_latents, picture_generators, roll_out
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.terms import artifact_term, diagnose

PICTURES = 8
MEBIBYTE = 2**20


class Kept:
    """Bytes that autograd keeps, by the place where they were saved: at the worst moment, parameters left out.

    Args:
        modules: whose parameters and buffers do not count.
    """

    def __init__(self, modules):
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        self.parameters = {_address(tensor) for tensor in tensors}
        self.users: dict[int, int] = {}
        self.sizes: dict[int, tuple[str, int]] = {}
        self.place = "rest"
        self.now = {"denoiser": 0, "vae": 0, "detector": 0, "rest": 0}
        self.worst = dict(self.now)

    def pack(self, tensor):
        address = _address(tensor)
        if address in self.parameters:
            return tensor
        held = _Held(tensor)
        if not self.users.get(address):
            self.sizes[address] = (self.place, tensor.untyped_storage().nbytes())
            self.now[self.place] += self.sizes[address][1]
            if sum(self.now.values()) > sum(self.worst.values()):
                self.worst = dict(self.now)
        self.users[address] = self.users.get(address, 0) + 1
        weakref.finalize(held, self._drop, address)
        return held

    def unpack(self, held):
        return held.tensor if isinstance(held, _Held) else held

    def _drop(self, address):
        self.users[address] -= 1
        if not self.users[address]:
            place, size = self.sizes.pop(address)
            self.now[place] -= size

    def hooks(self):
        """As long as it is entered, what autograd saves is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def at(self, place, function):
        """The function, with what is saved inside it booked under this place."""

        def counted(*args, **kwargs):
            before, self.place = self.place, place
            try:
                return function(*args, **kwargs)
            finally:
                self.place = before

        return counted


class _Held:
    # as long as autograd holds this, the storage lives and its address is not given out again
    def __init__(self, tensor):
        self.tensor = tensor


class Alive(TorchDispatchMode):
    """The most bytes of new storages alive at once while it is entered; `peak` holds it."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage(), known)
        return result

    def _see(self, storage, known):
        key = id(storage)
        if key in self.seen or key in known:
            return
        size = storage.nbytes()
        self.seen[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.now -= self.seen.pop(key)


def _address(tensor) -> int:
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.device.type == "meta" else storage.data_ptr()


# --- the demo's pipeline, really run ---


class Step:
    """One replay with its backward, of `PICTURES` pictures of the demo's untrained pipeline."""

    def __init__(self, sampling_steps=10, **options):
        self.config = TreatConfig(replay_area=0.0, log_with="none", sampling_steps=sampling_steps, **options)
        self.family = family_of(build_pipeline(["a dot"]))
        self.parameters = add_lora(self.family, rank=16, alpha=16.0, groups=("attention", "convolution"), seed=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.detector = ArtifactDetector.tiny().eval().requires_grad_(False)
        family, cpu = self.family, torch.device("cpu")
        schedule = {"num_inference_steps": sampling_steps}
        self.sampler = Sampler(family.pipeline.scheduler, device=cpu, timestep_options=schedule)
        self.conditioning = family.encode_prompts(
            ["a dot"] * PICTURES, guidance_scale=1.0, height=16, width=16, device=cpu
        )
        self.draw()

    def draw(self):
        """Roll out and diagnose."""
        config, family, steps = self.config, self.family, self.config.sampling_steps
        generators = picture_generators(range(PICTURES))
        latents = initial_latents(family, self.sampler, generators, 16, 16, torch.device("cpu"), torch.float32)
        keep = kept_steps(config.method, config.grad_steps, steps)
        with merged_lora(family):
            rollout = roll_out(family, self.sampler, self.conditioning, latents, generators, Guidance(), keep=keep)
        diagnose(family, self.detector, rollout.final)
        self.rollout = rollout

    def run(self):
        """Replay and backward."""
        artifact_term(
            self.family,
            self.sampler,
            self.rollout,
            torch.ones(PICTURES, 1, 16, 16),
            self.detector,
            Guidance(),
            self.config,
            total=PICTURES,
            generator=torch.Generator().manual_seed(0),
            seeds=range(PICTURES),
        )

    def measured(self) -> dict:
        """{"kept": bytes by place, "peak": bytes}."""
        with memory_options(self.family, self.config):
            kept = Kept((self.family.denoiser, self.family.vae, self.detector))
            with _booked(kept, self.family, self.detector), kept.hooks():
                self.run()
            with Alive() as alive:
                self.run()
        return {"kept": kept.worst, "peak": alive.peak}

    def gradient(self) -> torch.Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        with memory_options(self.family, self.config):
            self.run()
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters])


@contextlib.contextmanager
def _booked(kept, family, detector):
    family.denoise, family.decode = kept.at("denoiser", family.denoise), kept.at("vae", family.decode)
    detector.forward = kept.at("detector", detector.forward)
    try:
        yield
    finally:
        del family.denoise, family.decode, detector.forward


CASES = {
    "full": {"method": "full"},
    "draft_k": {},
    "draft_k, vae_slicing": {"vae_slicing": True},
    "draft_k, gradient_checkpointing": {"gradient_checkpointing": True},
    "draft_k, both": {"vae_slicing": True, "gradient_checkpointing": True},
}


def demo_table(repeats: int) -> list[dict]:
    """Bytes and seconds of every case, seconds interleaved over the cases."""
    steps = {name: Step(grad_steps=3, **options) for name, options in CASES.items()}
    forty = Step(40, grad_steps=3)
    seconds = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            with memory_options(step.family, step.config):
                started = time.perf_counter()
                step.draw()
                step.run()
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
    plain = steps["draft_k"].gradient()
    rows = []
    for name, step in steps.items():
        row = {"case": name, **step.measured(), "seconds": statistics.median(seconds[name])}
        if name.startswith("draft_k,"):
            row["gradient_difference"] = float((step.gradient() - plain).norm() / plain.norm())
        rows.append(row)
    return [*rows, {"case": "draft_k, 40 sampling steps", **forty.measured(), "seconds": None}]


# --- networks of a real size, shapes alone ---


@contextlib.contextmanager
def _made_in(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _stable_diffusion(dtype):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with _made_in(dtype):
        denoiser = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )

    def predict(latents):
        timesteps = torch.full((len(latents),), 500)
        hidden = torch.zeros(len(latents), 77, 768, dtype=latents.dtype)
        return denoiser(latents, timesteps, hidden, return_dict=False)[0]

    return denoiser, vae, predict, (4, 64, 64), ("to_q", "to_k", "to_v", "to_out.0")


def _flux(dtype):
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from diffdoctor.treat.families.flux import pack, unpack

    with _made_in(dtype):
        denoiser = FluxTransformer2DModel()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
    )

    def predict(latents):
        side = latents.shape[-1] // 2
        tokens = denoiser(
            hidden_states=pack(latents),
            encoder_hidden_states=torch.zeros(len(latents), 512, 4096, dtype=latents.dtype),
            pooled_projections=torch.zeros(len(latents), 768, dtype=latents.dtype),
            timestep=torch.full((len(latents),), 0.5, dtype=latents.dtype),
            txt_ids=torch.zeros(512, 3),
            img_ids=torch.zeros(side * side, 3),
            return_dict=False,
        )[0]
        return unpack(tokens, side, side)

    return denoiser, vae, predict, (16, 128, 128), ("to_q", "to_k", "to_v", "to_out.0")


REAL = {
    "SD 1.5, 512 x 512, 10 sampling steps": (_stable_diffusion, torch.float16, 10, 3),
    "FLUX.1, 1024 x 1024, 4 sampling steps": (_flux, torch.bfloat16, 4, 1),
}


def real_table() -> list[dict]:
    """Bytes and operations of one replay of one picture, for each network of a real size and each way to save."""
    rows = []
    for name, (build, dtype, steps, grad_steps) in REAL.items():
        cases = {
            "full": (steps, "kl", False, False),
            f"draft_k, K = {grad_steps}": (grad_steps, "kl", False, False),
            "  + denoiser checkpointed": (grad_steps, "kl", True, False),
            "  + denoiser and VAE checkpointed": (grad_steps, "kl", True, True),
            "  + both, VAE in tiles of 256": (grad_steps, "tiles", True, True),
            "  + both, a quarter of the tiles alone": (grad_steps, "flagged", True, True),
            "  + denoiser checkpointed, a tiny VAE": (grad_steps, "tiny", True, False),
        }
        for case, (count, decoder, denoiser_checkpointed, vae_checkpointed) in cases.items():
            row = _real_step(build, dtype, count, decoder, denoiser_checkpointed, vae_checkpointed)
            rows.append({"network": name, "case": case, **row})
    return rows


def _real_step(build, dtype, count, decoder, denoiser_checkpointed, vae_checkpointed) -> dict:
    """count denoiser passes, decoder (fp32) and detector (SegFormer-b5, fp32) of one picture, with their backward."""
    from diffusers import AutoencoderTiny
    from peft import LoraConfig
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        denoiser, vae, predict, shape, targets = build(dtype)
        if decoder == "tiny":
            vae = AutoencoderTiny(latent_channels=shape[0])
        detector = ArtifactDetector.of_size("b5").eval().requires_grad_(False)
        vae.requires_grad_(False)
        denoiser.requires_grad_(False)
        denoiser.add_adapter(LoraConfig(r=16, target_modules=list(targets)))
        if denoiser_checkpointed:
            denoiser.enable_gradient_checkpointing()
        if vae_checkpointed:
            vae.enable_gradient_checkpointing()
        if decoder in ("tiles", "flagged"):
            _in_tiles(vae, 256, flagged=0.25 if decoder == "flagged" else 1.0)
        kept = Kept((denoiser, vae, detector))

        def step():
            latents = torch.zeros(1, *shape, dtype=dtype)
            for _ in range(count):
                latents = latents - 0.1 * kept.at("denoiser", predict)(latents)
            ends = latents.detach().float().requires_grad_()
            pictures = kept.at("vae", vae.decode)(ends, return_dict=False)[0]
            logits = kept.at("detector", detector)(pictures / 2 + 0.5)
            logits.sigmoid().mean().backward()
            latents.backward(ends.grad.to(dtype))

        with _fused_attention(), FlopCounterMode(display=False) as operations, Alive() as alive, kept.hooks():
            step()
        return {"kept": kept.worst, "peak": alive.peak, "operations": operations.get_total_flops()}


@contextlib.contextmanager
def _fused_attention():
    """Memory-efficient attention, as a GPU takes it; without it a meta tensor's attention keeps all its weights."""

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        attention = torch.ops.aten._scaled_dot_product_efficient_attention
        return attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
        yield


def _in_tiles(vae, pixels, flagged):
    """Recompute the decoder tile by tile in backward, as `vae_tiling` does; a share of the tiles carries a graph."""
    from torch.utils.checkpoint import checkpoint

    vae.use_tiling, scale = True, 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size, vae.tile_latent_min_size = pixels, pixels // scale
    forward, calls = vae.decoder.forward, []

    def tile(latents, *rest):
        calls.append(1)
        if len(calls) % round(1 / flagged):
            with torch.no_grad():
                return forward(latents, *rest)
        return checkpoint(forward, latents, *rest, use_reentrant=False)

    vae.decoder.forward = tile


# --- what is printed ---


def as_markdown(demo: list[dict], real: list[dict]) -> str:
    """Both tables; shares are of the first row of each network."""
    first = demo[0]
    head = [
        "demo's pipeline, " + str(PICTURES) + " pictures",
        "kept: denoiser",
        "VAE, detector",
        "in all",
        "peak",
        "time",
    ]
    lines = [_row(*head), "|---" * len(head) + "|"]
    for row in demo:
        denoiser, total = row["kept"]["denoiser"], sum(row["kept"].values())
        seconds = "" if row["seconds"] is None else _share(row["seconds"], first["seconds"], f"{row['seconds']:.2f} s")
        lines.append(
            _row(
                row["case"],
                _share(denoiser, first["kept"]["denoiser"], _size(denoiser)),
                _size(total - denoiser),
                _share(total, sum(first["kept"].values()), _size(total)),
                _share(row["peak"], first["peak"], _size(row["peak"])),
                seconds,
            )
        )
    if real:
        head = ["one picture", "kept: denoiser", "VAE", "detector", "peak", "operations"]
        lines += ["", _row(*head), "|---" * len(head) + "|"]
    network = None
    for row in real:
        if row["network"] != network:
            network, first = row["network"], row
            lines.append(_row(f"**{network}**", *[""] * 5))
        kept = row["kept"]
        lines.append(
            _row(
                row["case"],
                *(_size(kept[place]) for place in ("denoiser", "vae", "detector")),
                _share(row["peak"], first["peak"], _size(row["peak"])),
                _share(row["operations"], first["operations"], f"{row['operations'] / 1e12:.0f} T"),
            )
        )
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _size(count: int) -> str:
    return f"{count / MEBIBYTE:,.1f} MiB" if count < 1024 * MEBIBYTE else f"{count / 1024 / MEBIBYTE:,.2f} GiB"


def _share(value, whole, text: str) -> str:
    return f"{text} ({value / whole:.2f})"


BOUNDS = {"kept in the denoiser": 0.31, "kept in all": 0.45, "time": 0.7}


def judged(demo: list[dict]) -> dict[str, float]:
    """draft_k's shares of full, by the names of `BOUNDS`, and how far 40 sampling steps are from 10."""
    rows = {row["case"]: row for row in demo}
    few, everything, forty = rows["draft_k"], rows["full"], rows["draft_k, 40 sampling steps"]
    total = {name: sum(row["kept"].values()) for name, row in rows.items()}
    return {
        "kept in the denoiser": few["kept"]["denoiser"] / everything["kept"]["denoiser"],
        "kept in all": total["draft_k"] / total["full"],
        "time": few["seconds"] / everything["seconds"],
        "growth from 10 to 40 sampling steps": sum(forty["kept"].values()) / total["draft_k"] - 1,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.treat_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of every case (default: 9)")
    parser.add_argument("--small", action="store_true", help="leave the networks of a real size out")
    parser.add_argument("--output", type=Path, help="a JSON file for everything that was measured")
    options = parser.parse_args(argv)
    demo = demo_table(options.repeats)
    real = [] if options.small else real_table()
    shares = judged(demo)
    print(as_markdown(demo, real))
    print()
    for name, value in shares.items():
        bound = BOUNDS.get(name)
        print(f"{name}: {value:.3f}" + (f" (at most {bound})" if bound else " (at most 0.02)"))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"demo": demo, "real": real, "shares": shares}, indent=1) + "\n")
    met = all(shares[name] <= bound for name, bound in BOUNDS.items())
    return 0 if met and abs(shares["growth from 10 to 40 sampling steps"]) <= 0.02 else 1


if __name__ == "__main__":
    raise SystemExit(main())
