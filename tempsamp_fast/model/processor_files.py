"""Settings of transformers' processors for a model whose checkpoint has none, so that `AutoProcessor` loads it."""

from __future__ import annotations

import json
from typing import Any

from tempsamp_fast.model.families import family_of, geometry_of

NAMES = ("preprocessor_config.json", "video_preprocessor_config.json")


def processor_files(model_config: Any) -> dict[str, str]:
    """Texts by name: sizes of patches and limits of frames as the model's family has them, by its video processor."""
    geometry = geometry_of(model_config)
    shared: dict[str, Any] = {
        "patch_size": geometry.patch_size,
        "temporal_patch_size": geometry.temporal_patch_size,
        "merge_size": geometry.merge_size,
        "image_mean": list(geometry.mean),
        "image_std": list(geometry.std),
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
    }
    is_third = family_of(model_config).has_timestamps
    most = geometry.total_pixels if is_third else geometry.max_pixels
    sizes = {"size": {"shortest_edge": geometry.min_pixels, "longest_edge": most}}
    kinds = {"processor_class": "Qwen3VLProcessor" if is_third else "Qwen2_5_VLProcessor"}
    image = {"image_processor_type": "Qwen2VLImageProcessor"}
    video = {"video_processor_type": "Qwen3VLVideoProcessor" if is_third else "Qwen2VLVideoProcessor"}
    both = {NAMES[0]: shared | sizes | kinds | image, NAMES[1]: shared | sizes | kinds | video}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in both.items()}
