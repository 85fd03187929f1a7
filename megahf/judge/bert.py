"""From `args` to real BertModels, the way `model_provider` of Megatron's examples/bert/pretrain_bert.py builds them.

No argument of Megatron's says that a run is BERT's; here `megahf.bert.MARK` does, which no file gets. Inputs are made
of the tokens alone: 0 is padding, and the second sentence comes after the first separator.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megahf.bert import LOCAL_SPEC, MARK
from megahf.judge import transformer_engine

if TYPE_CHECKING:
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.transformer import TransformerConfig

PADDING, FIRST, SEPARATOR = 0, 1, 2  # ids of tokens; words come after them


def is_bert(args: Namespace) -> bool:
    return bool(getattr(args, MARK, False))


def derive(args: Namespace) -> None:
    """What the script goes by: `--spec local` for Megatron's own layers."""
    if is_bert(args):
        args.spec = list(LOCAL_SPEC) if args.transformer_impl == "local" else None


def as_stored(args: Namespace) -> Namespace:
    """What a real run stores: without the mark."""
    return Namespace(**{name: value for name, value in vars(args).items() if name != MARK})


def chunk(args: Namespace, made: TransformerConfig, first: bool, last: bool, stage: int | None) -> BertModel:
    """`model_provider`; where args ask for another position embedding than the script builds, with that."""
    from megatron.core.models.bert.bert_model import BertModel

    return BertModel(
        config=made,
        num_tokentypes=2 if args.bert_binary_head else 0,
        transformer_layer_spec=layer_spec(args),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        add_binary_head=args.bert_binary_head,
        vp_stage=stage,
    )


def layer_spec(args: Namespace) -> Any:
    """Megatron's own spec of a layer, and the final norm with it."""
    from megatron.core.models.bert import bert_layer_specs

    engine = args.transformer_impl == "transformer_engine"
    transformer_engine.choose_final_norm(engine)
    if engine:
        return bert_layer_specs.get_bert_layer_with_transformer_engine_spec()
    return bert_layer_specs.bert_layer_local_spec


def tokens(vocabulary: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Pairs of sentences `[b, s]` of random words; each row but the first is shorter by a third, and padded."""
    rows, length = shape
    ids = torch.randint(SEPARATOR + 1, vocabulary, shape, generator=generator)
    ids[:, 0] = FIRST
    for row, tail in zip(ids, [length] + [length - length // 3] * (rows - 1), strict=True):
        row[tail // 2], row[tail - 1] = SEPARATOR, SEPARATOR
        row[tail:] = PADDING
    return ids


def inputs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and token types `[b, s]` of tokens."""
    separators = (ids == SEPARATOR).long()
    return (ids != PADDING).long(), ((separators.cumsum(dim=1) - separators) > 0).long()


def outputs(ids: Tensor, words: Tensor, pairs: Tensor | None) -> Tensor:
    """All that a model says as one `[b, s + 1, V]`: scores of words, 0 at padding; then those of pairs, 0 beyond."""
    mask, _ = inputs(ids)
    pairs = words.new_zeros(len(ids), 2) if pairs is None else pairs
    return torch.cat([words * mask[..., None], F.pad(pairs, (0, words.shape[2] - 2))[:, None]], dim=1)


@torch.no_grad()
def logits(args: Namespace, models: list[BertModel], ids: Tensor) -> Tensor | None:
    """Pipelined forward of tokens `[b, s]`: fp32 `[1, b, s + 1, padded vocabulary]`, as `outputs` has it.

    None but on the last stage.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    stages = args.pipeline_model_parallel_size
    rank = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    mask, types = inputs(ids)
    call = (ids, mask, types if args.bert_binary_head else None)
    hidden = torch.empty(ids.shape[1], ids.shape[0], args.hidden_size)  # [s, b, h]
    for step in range(stages * len(models)):
        turn, stage = divmod(step, stages)
        last = step == stages * len(models) - 1
        if stage == rank:
            models[turn].set_input_tensor(None if step == 0 else hidden)
            if last:
                words, pairs = models[turn](*call)
                return outputs(ids, gather_from_tensor_model_parallel_region(words), pairs)[None]
            hidden = models[turn](*call).contiguous()
        if stages > 1 and not last:
            torch.distributed.broadcast(hidden, ranks[stage], group=group)
    return None


@torch.no_grad()
def ours(model: Any, ids: Tensor) -> Tensor:
    """What a model of megahf's says to tokens `[b, s]`, as `outputs` has it: `[b, s + 1, V]`."""
    mask, types = inputs(ids)
    said = model(ids, attention_mask=mask, token_type_ids=types if model.config.num_tokentypes else None)
    words = said.logits if "logits" in said else said.prediction_logits
    return outputs(ids, words, said.get("seq_relationship_logits"))
