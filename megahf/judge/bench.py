"""Cases of the judge: references of one process each, and checkpoints whose logits equal them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megahf.checkpoint import open_checkpoint
from megahf.discovery import marked, shapes_of
from megahf.errors import refuse
from megahf.judge.multimodal import SIZES
from megahf.judge.namespace import data_parallel_size, recovered
from megahf.judge.pool import Pool

# What a layout says, and what the one process of a reference has instead.
LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
    "data_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}


class Bench:
    """Makes checkpoints with real Megatron-core; references are made once for each model and dtype and kept.

    Args:
        size: worker processes, the largest tensor x pipeline (x data) parallel world it can serve.
    """

    def __init__(self, size: int = 4) -> None:
        self.pool = Pool(size)
        self.folder = tempfile.TemporaryDirectory(prefix="megahf-bench-")
        self.references: dict[str, Path] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()
        self.folder.cleanup()

    def reference(
        self,
        arguments: Mapping[str, Any],
        weights: Path | None = None,
        seed: int = 7,
        shape: tuple[int, int] | None = None,
    ) -> Path:
        """A folder with `reference.pt` (tokens, fp32 logits, TP1 state dict, args) and `weights` to shard from.

        Args:
            shape: batch and length of the tokens; two sequences of `seq_length` if not given.
        """
        single = {**arguments, **LAYOUT}
        shape = shape or (2, arguments["seq_length"])
        digest = hashlib.sha256(json.dumps([single, str(weights), seed, shape], sort_keys=True).encode()).hexdigest()
        if digest not in self.references:
            out = Path(self.folder.name) / digest
            self.pool.run("reference", 1, arguments=single, out=out, weights=weights, seed=seed, shape=shape)
            self.references[digest] = out
        return self.references[digest]

    def save(
        self,
        arguments: Mapping[str, Any],
        out: Path,
        format: str = "torch",
        extra_state: str = "tensor",
        **reference: Any,
    ) -> float:
        """Writes the checkpoint of `arguments` and its `reference.pt` to the new folder `out`.

        Args:
            arguments: Megatron's, over its defaults: model, layout, dtype (`bf16`, `fp16`), `transformer_impl`.
            format: a name in `save.FORMATS`.
            extra_state: what emulated TE modules store: "tensor" or "bytes".
            reference: `weights`, `seed`, `shape` of the reference.

        Returns:
            The largest difference of the sharded model's logits to the single process.

        Raises:
            Failed: Megatron refused the case, or the sharded logits are not the single ones.
        """
        if out.exists():
            raise refuse("the target exists already", out, "choose a new folder")
        source = self.reference({**arguments, **common(arguments)}, **reference)
        differences = self.pool.run(
            "save", world(arguments), arguments=dict(arguments), source=source, out=out, format=format,
            extra_state=extra_state,
        )  # fmt: skip
        return max(difference for difference in differences if difference is not None)

    def step(self, arguments: Mapping[str, Any]) -> Path:
        """A file with what the `reference.pt` of `arguments` says, and `losses` and `gradients` of one training step.

        In fp32 on one process, on the tokens of the reference; both are dicts, the gradients' of TP1 names.
        """
        single = {**arguments, **LAYOUT}
        source = self.reference({**single, **common(arguments)})
        out = source / f"step_{arguments['transformer_impl']}.pt"
        if not out.exists():
            self.pool.run("step", 1, arguments=single, source=source, out=out)
        return out

    def save_weights(
        self, arguments: Mapping[str, Any], state_dict: Path, out: Path, format: str = "torch_dist"
    ) -> float:
        """As `save`, for given weights: a `torch.save`d TP1 state dict in the local spec's names."""
        return self.save(arguments, out, format, weights=state_dict, shape=(1, 16))

    def logits(
        self,
        arguments: Mapping[str, Any],
        checkpoint: Path,
        format: str,
        input_ids: np.ndarray,
        sharded: bool = False,
    ) -> np.ndarray:
        """fp32 logits `[b, s, padded vocabulary]` of the tokens `[b, s]`, by Megatron from the weights in `checkpoint`.

        Args:
            arguments: the checkpoint's.
            sharded: by the ranks of its layout, as `torch` is always loaded; else by one process.
            checkpoint: the iteration's directory. Megatron unpickles it: only for files that are trusted.
        """
        chosen = dict(arguments) if sharded or format == "torch" else {**arguments, **LAYOUT}
        answers = self.pool.run(
            "logits", world(chosen), arguments=chosen, checkpoint=checkpoint, format=format, input_ids=input_ids
        )
        return next(answer for answer in answers if answer is not None)

    def difference(self, written: Path, known: Mapping[str, Any]) -> float:
        """How far Megatron's logits of a checkpoint that megahf wrote are from those in the `known` reference.

        Megatron loads it in every rank of its layout, by the arguments that lie in it.
        """
        checkpoint, size = open_checkpoint(written), known["args"]["vocab_size"]
        tokens, arguments = known["input_ids"].numpy(), recovered(marked(checkpoint.args, shapes_of(checkpoint)))
        arguments |= {name: known["args"][name] for name in SIZES if name in known["args"]}
        found = self.logits(arguments, checkpoint.path, checkpoint.format, tokens, sharded=True)
        return float(np.abs(found[..., :size] - known["logits"].numpy()[..., :size]).max())


def common(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What models of the same mathematics have in their one reference: the local spec, experts one by one.

    Zero-centred gamma is TE's alone.
    """
    alone = arguments.get("layernorm_zero_centered_gamma")
    return {"moe_grouped_gemm": False, "transformer_impl": "transformer_engine" if alone else "local"}


def world(arguments: Mapping[str, Any]) -> int:
    """Processes that the layout in `arguments` takes."""
    layout = {**LAYOUT, **arguments}
    tensor, pipeline = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    return int(tensor * pipeline * data_parallel_size(layout))
