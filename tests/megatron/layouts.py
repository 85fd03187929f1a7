"""The parallel layouts the tests know, as Megatron arguments: one row a layout, every one of them for four layers."""

from __future__ import annotations

from typing import Any


def grid(tensor: int = 1, pipeline: int = 1, virtual: int | None = None, **more: Any) -> dict[str, Any]:
    """Tensor x pipeline ranks, `virtual` chunks on each."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        **more,
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": grid(),
    "tp2": grid(2),
    "tp4": grid(4),
    "tp2_dp2": grid(2, data_parallel_size=2),
    "pp2": grid(1, 2),
    "tp2_pp2": grid(2, 2),
    "pp2_vpp2": grid(1, 2, 2, num_virtual_stages_per_pipeline_rank=2),
    "tp2_pp2_vpp2": grid(2, 2, 2, num_virtual_stages_per_pipeline_rank=2),
    "pp2_first1": grid(1, 2, decoder_first_pipeline_num_layers=1),  # 1, 3
    "pp3_first1_last1": grid(1, 3, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=1),  # 1, 2, 1
    "tp2_pp2_last1": grid(2, 2, decoder_last_pipeline_num_layers=1),  # 3, 1
    "pp3_accounted": grid(  # 1, 2, 1: the embedding and the loss count as a layer each
        1, 3, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    ),
    "string_pp2_vpp2": grid(1, 2, 2, pipeline_model_parallel_layout="Et|t|tt|L"),
    "string_pp4": grid(1, 4, pipeline_model_parallel_layout="E|(tt|)*2L"),  # the embedding and the loss on their own
}


def experts(count: int, tensor: int | None = None) -> dict[str, Any]:
    """Expert ranks, and tensor ranks inside an expert; as many as elsewhere if not given."""
    return {"expert_model_parallel_size": count, "expert_tensor_parallel_size": tensor}


# Layouts for models with experts alone. The world is the smallest that both tensor x data and, with the experts' own
# tensor ranks, expert tensor x expert ranks fit into, times the pipeline.
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": grid(**experts(2)),  # a world of 2
    "ep4": grid(**experts(4)),
    "ep2_dp4": grid(**experts(2), data_parallel_size=4),
    "tp2_etp1": grid(2, **experts(1, 1)),  # whole experts, twice
    "tp2_ep2": grid(2, **experts(2)),  # 4: experts are cut in two as well
    "tp2_ep2_etp1": grid(2, **experts(2, 1)),  # 2: files (0, 0) and (1, 1) alone
    "tp2_ep2_etp2": grid(2, **experts(2, 2)),
    "tp2_ep2_etp1_dp2": grid(2, **experts(2, 1), data_parallel_size=2),
    "tp4_ep2_etp1": grid(4, **experts(2, 1)),  # 4: a file a tensor rank
    "tp4_ep2_etp2": grid(4, **experts(2, 2)),
    "pp2_ep2": grid(1, 2, **experts(2)),
    "pp2_vpp2_ep2": grid(1, 2, 2, num_virtual_stages_per_pipeline_rank=2, **experts(2)),
    "tp2_pp2_ep2_etp1": grid(2, 2, **experts(2, 1)),
    "tp2_pp2_ep2": grid(2, 2, **experts(2)),  # 8
    "string_pp2_vpp2_mtp_ep2": grid(1, 2, 2, pipeline_model_parallel_layout="Et|t|tt|mL", **experts(2)),
}
# The heads for further tokens have a place in a layout that is written out.
MTP_LAYOUTS: dict[str, dict[str, Any]] = {
    "string_pp2_vpp2_mtp": grid(1, 2, 2, pipeline_model_parallel_layout="Et|t|tt|mL"),
    "string_pp2_mtp2": grid(1, 2, pipeline_model_parallel_layout="Ettt|tmmL"),
}
