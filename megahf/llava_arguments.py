"""Arguments that Megatron's examples/multimodal/multimodal_args.py adds to those of every run, and their defaults."""

from __future__ import annotations

from typing import Any

OFF = """
allow_checkpoint_without_temporal_compression allow_cross_sample_attention allow_large_videos
allow_missing_conv_merge_checkpoint allow_missing_sound_model_checkpoint allow_missing_sound_projection_checkpoint
allow_missing_vision_projection_checkpoint apply_data_augment conv_merging decoder_tp_comm_overlap
disable_vision_class_token dynamic_resolution dynamic_resolution_no_truncate force_system_message freeze_LM
freeze_ViT freeze_sound_model freeze_sound_projection freeze_vision_projection log_model_act_norms
log_model_grad_norms masked_tiling_dynamic_resolution match_tiling_dynamic_resolution no_calculate_per_token_loss
only_keep_samples_with_img pixel_shuffle radio_cpe_aspect_ratio_select radio_disable_cpe radio_force_cpe_eval_mode
radio_force_eval_mode radio_interpolate_only_cpe recompute_sound recompute_sound_projection recompute_vision
recompute_vision_projection relax_sender_check relax_thinking_trace_check separate_video_embedder
sound_pad_to_clip_duration tokenizer_keep_history_thinking unfreeze_router use_area_weighted_aspect_ratio
use_loss_scaling use_mcore_inference use_new_dataloader_path use_thumbnail use_tile_tags use_tiling
use_vision_backbone_fp8_arch video_aug_scale_resolution_only video_frame_temporal_jitter video_maintain_aspect_ratio
"""
ABSENT = """
class_token_len dataloader_save dataloader_seq_length dataset_config dynamic_resolution_min_side
efficient_video_sampling_variant eos_id image_break_token language_model_type online_evaluation_config
packing_buffer_size prompt_path recompute_granularity_vision recompute_method_vision sound_model_type
tokenizer_prompt_format use_te video_aug_scale_frames_up video_aug_scale_resolution_up video_target_img_size
video_target_num_patches
"""
# use_te is off in the script; None here: as `transformer_impl` has it, which says what the judge's layers are made of.
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(OFF.split(), False),
    **dict.fromkeys(ABSENT.split()),
    **dict.fromkeys(
        ("dataloader_seed", "dynamic_resolution_max_patches", "dynamic_resolution_min_patches", "lr_data_range_start",
         "packing_seq_length", "recompute_vision_num_layers"), 0
    ),
    **dict.fromkeys(("max_num_tiles", "num_frames", "sound_batch_split", "video_temporal_patch_size"), 1),
    **dict.fromkeys(("enable_fusions", "optimize_broadcast"), True),
    "image_tag_type": "", "lr_data_range_end": 100, "packing_knapsack_algorithm": "greedy_knapsack",
    "sound_clip_duration": 30, "sound_embedding_size": 750, "sound_min_duration": 0.1, "sound_target_rate": 16000,
    "special_tokens": ["<image>"], "thumbnail_area_threshold": 0.8, "video_default_fps": 2, "video_max_num_frames": 32,
    "video_min_num_frames": 8, "video_prompt_version": 2, "vision_model_type": "clip",
}  # fmt: skip
# Those that 0.16.1 has; the others came in 2026.
OF_0_16 = """
allow_missing_vision_projection_checkpoint dataloader_save dataloader_seq_length dataset_config
disable_vision_class_token eos_id force_system_message freeze_LM freeze_ViT image_tag_type language_model_type
max_num_tiles num_frames online_evaluation_config packing_buffer_size packing_seq_length pixel_shuffle prompt_path
recompute_vision special_tokens tokenizer_prompt_format use_area_weighted_aspect_ratio use_loss_scaling
use_mcore_inference use_te use_thumbnail use_tile_tags use_tiling vision_model_type
"""
PROJECTION = "vision_projection_type"  # since 2026 the script asks for it, and no argument of its own gives it
