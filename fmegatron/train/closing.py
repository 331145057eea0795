"""The end of a run: what came out, where it lies, how to go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fmegatron.sharding import Mesh
from fmegatron.train import balance, checkpoint, metrics, page, report, saving
from fmegatron.train.assemble import Parts
from fmegatron.train.state import TrainState

Sampler = Callable[[Path, str], str]  # (checkpoint, prompt) -> text


def close(parts: Parts, state: TrainState, why: str | None, sample: Sampler | None) -> None:
    """Say what came out, where it lies and how to go on; a picture, and text that the model wrote.

    why: it ended before all steps were done; None where they are.
    """
    saved = checkpoint.latest(parts.checkpoints)
    if not parts.first or saved is None:
        return
    c, again = parts.config, _command(parts.sh.mesh, f"train {parts.folder / 'config.toml'}")
    drawn = page.write(parts.folder) if c.log.report else None
    if why is not None:
        parts.say(f"stopped at step {saving.steps_so_far(state)} ({why}); saved {saved}\nresume  {again}")
        return
    records = metrics.read(parts.folder / "metrics.jsonl")
    bits = next((r["bits_per_byte"] for r in reversed(records) if r.get("bits_per_byte")), None)
    title = f"{parts.model.count() / 1e6:.1f}M parameters, {c.data.source}"
    picture = report.loss_curve(records, parts.folder / "loss.png", compressors=parts.source.compressors, title=title)
    balance.picture(records, parts.folder / "experts.png")
    text = sample(saved, c.log.prompt) if sample is not None and parts.source.corpus is not None and c.log.prompt else ""
    if text:
        (parts.folder / "sample.txt").write_text(text, encoding="utf-8")
    steps = c.training.steps
    parts.say(
        report.closing(
            steps=steps,
            seconds=sum(float(r.get("seconds") or 0.0) for r in records),
            heldout_bits_per_byte=float(bits) if bits is not None else None,
            compressors=parts.source.compressors,
            sample=text,
            checkpoint=saved,
            picture=picture,
            page=drawn,
            resume=f"{again} --training.steps {2 * steps}",
            generate=f'fmegatron generate {parts.folder} "{c.log.prompt}"' if parts.model.output is not None else "",
        )
    )


def _command(mesh: Mesh, words: str) -> str:
    return f"torchrun --nproc-per-node {mesh.size} -m fmegatron {words}" if mesh.kind == "device" else f"fmegatron {words}"
