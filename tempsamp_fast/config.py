"""Every setting of a run as flat dataclasses; `arguments.py` reads them from the command line and from YAML."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tempsamp_fast.sample import Mode, Task

Method = Literal["sft", "grpo", "tempsamp"]
LigerLayers = Literal["auto", "on", "off"]
AttentionCore = Literal["auto", "split", "varlen", "flex"]
Shaping = Literal["grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl"]
METHODS: tuple[str, ...] = get_args(Method)
MODES: tuple[str, ...] = get_args(Mode)
PHASE = r"(\w+)(?:/([\w+]+))?:(?:(\d+)|(\d+(?:\.\d+)?)epochs?)(?:@(\d+(?:\.\d+)?(?:e[+-]?\d+)?))?"


@dataclass(frozen=True)
class Phase:
    """A stretch of optimizer steps with one method; prompts take its modes in turn."""

    method: Method
    modes: tuple[Mode, ...]
    num_steps: int
    """0 until `schedule.in_steps` counts the steps of `num_epochs`."""
    learning_rate: float | None = None
    """Peak of this phase; None: the run's."""
    num_epochs: float | None = None

    def __str__(self) -> str:
        return f"{self.method}/{'+'.join(self.modes)}"


def parse_phases(text: str) -> list[Phase]:
    """Read `method[/mode[+mode]]:steps[@rate]` entries separated by commas, e.g. `sft:300@1e-5,grpo/think:1epoch`.

    Steps are a number of optimizer steps, or of epochs over the training samples. The mode defaults to `answer`, the
    rate to the run's. Raises ValueError that names the entry and the choices.
    """
    phases = []
    for entry in text.split(","):
        match = re.fullmatch(PHASE, entry.strip())
        if not match:
            raise ValueError(
                f"phases: {entry.strip()!r} is not method[/mode]:steps[@learning rate], such as tempsamp/think:150 or "
                "sft:2epochs"
            )
        method, modes = match[1], (match[2] or "answer").split("+")
        steps, epochs = int(match[3] or 0), float(match[4]) if match[4] else None
        if method not in METHODS:
            raise ValueError(f"phases: method {method!r} in {entry.strip()!r}; choose from {', '.join(METHODS)}")
        for mode in modes:
            if mode not in MODES:
                raise ValueError(f"phases: mode {mode!r} in {entry.strip()!r}; choose from {', '.join(MODES)}")
        if steps < 1 and not epochs:
            raise ValueError(f"phases: {entry.strip()!r} has no steps")
        rate = float(match[5]) if match[5] else None
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"phases: {entry.strip()!r} has a learning rate of {rate}")
        phases.append(Phase(method, tuple(modes), steps, rate, epochs))  # type: ignore[arg-type]
    return phases


def parse_range(name: str, text: str | None) -> tuple[float, float]:
    """Read `low:high`, both included; either may be left out. None is everything.

    Raises ValueError naming the setting `name` and the value.
    """
    if text is None:
        return -math.inf, math.inf
    low, separator, high = text.partition(":")
    try:
        ends = float(low or "-inf"), float(high or "inf")
    except ValueError:
        ends = math.nan, math.nan
    if not separator or not ends[0] <= ends[1]:
        raise ValueError(f"{name}={text!r}: must be low:high, such as 5:150 or :60")
    return ends


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {rule}")


@dataclass
class DataConfig:
    """What is asked: annotations, videos and how frames are taken."""

    annotations: str = field(
        default="synthetic",
        metadata={"help": "training file, data set name (charades-train, ...), or 'synthetic': the embedded data set"},
    )
    eval_annotations: str | None = field(default=None, metadata={"help": "held-out file or data set name"})
    videos: str | None = field(default=None, metadata={"help": "folder of <video id>.{mp4,mkv,webm,avi}"})
    eval_videos: str | None = field(
        default=None, metadata={"help": "folder of the held-out videos where it is another (out of domain)"}
    )
    few_shot_videos: int | None = field(default=None, metadata={"help": "train on this many videos, drawn at random"})
    few_shot_seed: int = field(default=0, metadata={"help": "which ones; smaller subsets lie within larger ones"})
    few_shot_queries: Literal["all", "one"] = field(default="all", metadata={"help": "of each drawn video"})
    duration_range: str | None = field(default=None, metadata={"help": "train on videos of low:high seconds only"})
    window_range: str | None = field(default=None, metadata={"help": "train on true spans of low:high seconds only"})
    difficulty_range: str | None = field(default=None, metadata={"help": "train on difficulties in low:high only"})
    synthetic_dir: str = field(default="data/synthetic", metadata={"help": "where the embedded data set is kept"})
    synthetic_videos: str = field(default="700,20,220", metadata={"help": "embedded videos: train,val,test"})
    task: Task = "grounding"
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate the first N queries only"})
    on_bad_video: Literal["raise", "skip"] = "raise"
    max_bad_videos: int | None = field(
        default=None,
        metadata={
            "help": "training samples that each process may replace for a bad video, per epoch and anew when resumed; "
            "data/bad_videos in metrics.jsonl has those of each step, of all ranks"
        },
    )
    video_backend: Literal["auto", "native", "torchcodec"] = "auto"
    video_device: Literal["cpu", "cuda", "auto"] = field(
        default="cpu", metadata={"help": "what decodes: cuda is the hardware decoders of each rank's GPU"}
    )
    sampling: Literal["pts", "qwen_utils", "hf_qwen2", "hf_qwen3"] = "pts"
    fps: float = field(default=2.0, metadata={"help": "frames per second shown to the model"})
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = field(default=None, metadata={"help": "per frame; None: the model family's default"})
    max_pixels: int | None = field(default=None, metadata={"help": "per frame; None: the model family's default"})
    total_pixels: int | None = field(default=None, metadata={"help": "per video; None: the model family's default"})
    random_crop: float = field(
        default=0.0, metadata={"help": "share of training videos cut to a random stretch around their true spans"}
    )
    prefetch_steps: int = field(default=2, metadata={"help": "steps whose videos are decoded ahead"})
    patch_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps decoded videos and packet indexes between runs"}
    )
    video_cache_gib: float = field(default=2.0, metadata={"help": "memory for decoded videos, per process"})
    cache_features: bool = field(
        default=False,
        metadata={"help": "keep what a frozen vision tower made of a video there and in patch_cache, not its pixels"},
    )

    def __post_init__(self) -> None:
        _require(0 < self.fps < math.inf, "fps", self.fps, "positive")
        _require(2 <= self.min_frames <= self.max_frames, "min_frames", self.min_frames, "between 2 and max_frames")
        _require(0 <= self.random_crop <= 1, "random_crop", self.random_crop, "in [0, 1]")
        bad = self.max_bad_videos
        _require(bad is None or bad >= 0, "max_bad_videos", bad, "zero or more")
        _require(self.prefetch_steps >= 1, "prefetch_steps", self.prefetch_steps, "at least 1")
        _require(self.video_cache_gib >= 0, "video_cache_gib", self.video_cache_gib, "zero or more")
        for name in ("min_pixels", "max_pixels", "total_pixels"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "positive")
        _require(
            self.max_eval_samples is None or self.max_eval_samples >= 0,
            "max_eval_samples", self.max_eval_samples, "zero (no evaluation) or more",
        )  # fmt: skip
        few = self.few_shot_videos
        _require(few is None or few >= 1, "few_shot_videos", few, "at least 1")
        for name in ("duration_range", "window_range", "difficulty_range"):
            parse_range(name, getattr(self, name))
        has_test = self.eval_annotations is not None
        _require(self.eval_videos is None or has_test, "eval_videos", self.eval_videos, "given with eval_annotations")
        if self.annotations != "synthetic":
            _require(self.videos is not None, "videos", self.videos, "given with your own annotations")

    def num_synthetic_videos(self) -> tuple[int, int, int]:
        """Embedded videos for training, validation and test."""
        try:
            train, val, test = (int(part) for part in self.synthetic_videos.split(","))
        except ValueError:
            raise ValueError(
                f"synthetic_videos={self.synthetic_videos!r}: must be train,val,test such as 600,20,300"
            ) from None
        return train, val, test


@dataclass
class ModelConfig:
    """Which model learns, and what of it."""

    model: str = field(
        default="tiny", metadata={"help": "checkpoint folder, hub name, or 'tiny' for the embedded model"}
    )
    tiny_family: Literal["qwen2_5_vl", "qwen3_vl"] = "qwen2_5_vl"
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU, float32 on a CPU"}
    )
    freeze_vision: bool = False
    lora_rank: int = field(
        default=0, metadata={"help": "train adapters of this rank on the language model; 0: all weights"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "scale of the adapters; None: twice the rank"})
    lora_targets: str = field(
        default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        metadata={"help": "linear layers of the language model that get adapters"},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass instead of keeping them"}
    )
    checkpoint_every: int = field(default=1, metadata={"help": "of the decoder layers, recompute every k-th"})
    checkpoint_vision: bool = field(default=True, metadata={"help": "recompute the vision tower's blocks too"})
    attention_core: AttentionCore = field(
        default="auto",
        metadata={"help": "how packed rows attend: auto is one varlen flash call on a GPU, split SDPA calls elsewhere"},
    )
    liger_layers: LigerLayers = field(
        default="auto", metadata={"help": "Liger's fused RMSNorm, SwiGLU and rotary positions; auto: on with a GPU"}
    )
    trust_remote_code: bool = False
    allow_pickle: bool = field(
        default=False, metadata={"help": "also load weights and state from pickles, which can run any code"}
    )

    def __post_init__(self) -> None:
        _require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "at least 1")
        _require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "zero (off) or more")
        _require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "positive")


@dataclass
class RolloutConfig:
    """How answers are sampled."""

    num_generations: int = field(default=4, metadata={"help": "answers per prompt, the off-policy one included"})
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = field(default=0, metadata={"help": "0: off"})
    max_completion_length: int = 256
    rollout_backend: Literal["policy", "vllm"] = field(
        default="policy", metadata={"help": "what samples: the training weights themselves, or vLLM on the same GPU"}
    )
    vllm_memory: float = field(default=0.3, metadata={"help": "share of the GPU's memory that vLLM takes"})
    cuda_graphs: bool = field(default=False, metadata={"help": "replay decoding passes as CUDA graphs"})
    record_rollouts: str | None = field(
        default=None, metadata={"help": "write every sampled answer to this JSONL file"}
    )
    replay_rollouts: str | None = field(default=None, metadata={"help": "take the answers from a recorded file"})

    def __post_init__(self) -> None:
        _require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")
        _require(self.temperature > 0, "temperature", self.temperature, "positive")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "zero (off) or more")
        _require(self.max_completion_length >= 1, "max_completion_length", self.max_completion_length, "at least 1")
        _require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "in (0, 1)")
        _require(
            self.record_rollouts is None or self.replay_rollouts is None,
            "record_rollouts", self.record_rollouts, "unset when replay_rollouts is given",
        )  # fmt: skip
        _require(
            not self.cuda_graphs or self.rollout_backend == "policy",
            "cuda_graphs", self.cuda_graphs, f"False with rollout_backend={self.rollout_backend!r}",
        )  # fmt: skip


@dataclass
class AlgorithmConfig:
    """Advantages and loss (paper section 3; defaults are the paper's best)."""

    shaping: Shaping = field(default="nonlinear", metadata={"help": "advantage rule of the tempsamp method"})
    tau: float = 0.8
    alpha_1: float = 0.01
    alpha_2: float = 1.0
    lambda_off: float = 1.2
    downscale: float = 0.8
    cot_off_policy: Literal["template", "answer_only", "skip"] = "template"
    beta: float = field(default=0.04, metadata={"help": "weight of the KL to the reference; 0 loads no reference"})
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = field(default=None, metadata={"help": "upper bound of the ratio (two-sided clipping)"})
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    off_policy_ratio: Literal["detach", "old"] = "detach"
    off_policy_kl: bool = True
    updates_per_batch: int = field(default=1, metadata={"help": "optimizer updates on every sampled batch"})
    format_weight: float = field(default=1.0, metadata={"help": "weight of the format reward in think mode"})
    require_tags: bool = field(default=True, metadata={"help": "no <answer> tags, no reward"})
    loss_impl: Literal["auto", "triton", "torch"] = "auto"

    def __post_init__(self) -> None:
        _require(0 < self.tau <= 1, "tau", self.tau, "in (0, 1]")
        _require(self.alpha_1 > 0, "alpha_1", self.alpha_1, "positive")
        _require(self.alpha_2 > 0, "alpha_2", self.alpha_2, "positive")
        _require(self.beta >= 0, "beta", self.beta, "zero or more")
        _require(0 <= self.epsilon_low < 1, "epsilon_low", self.epsilon_low, "in [0, 1)")
        _require(self.epsilon_high >= 0, "epsilon_high", self.epsilon_high, "zero or more")
        _require(self.delta is None or self.delta > 1 + self.epsilon_high, "delta", self.delta, "over 1 + epsilon_high")
        _require(self.updates_per_batch >= 1, "updates_per_batch", self.updates_per_batch, "at least 1")


@dataclass
class TrainConfig:
    """The run: phases, optimizer, distribution, records."""

    phases: str = field(
        default="sft:300,tempsamp/answer:150,tempsamp/think:150",
        metadata={
            "help": "method[/mode[+mode]]:steps[@rate], ...; steps may be epochs (sft:2epochs); methods sft, grpo, "
            "tempsamp; modes answer, think"
        },
    )
    output_dir: str = field(default="runs/tiny", metadata={"help": "run folder"})
    resume: str | None = field(default=None, metadata={"help": "continue the run in this folder"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan (samples, steps, memory, FLOPs) and stop"})
    seed: int = 0
    prompts_per_device: int = field(default=1, metadata={"help": "prompts per device and micro-step"})
    sft_prompts_per_device: int | None = field(default=None, metadata={"help": "the same in sft phases; None: equal"})
    gradient_accumulation_steps: int = 2
    max_tokens_per_row: int = field(default=32768, metadata={"help": "token budget of one packed row"})
    packing: Literal["shared_prefix", "none"] = "shared_prefix"
    learning_rate: float = 1e-6
    lr_schedule: Literal["constant", "cosine", "linear"] = field(
        default="constant", metadata={"help": "within each phase"}
    )
    warmup_ratio: float = field(default=0.05, metadata={"help": "of each phase's steps"})
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    zero_stage: Literal["0", "1", "2", "3"] = "0"
    offload: Literal["none", "optimizer", "all"] = field(
        default="none",
        metadata={
            "help": "to CPU memory: the optimizer's state (zero_stage 1 and up), or parameters too (zero_stage 3)"
        },
    )
    deepspeed_config: str | None = field(
        default=None, metadata={"help": "JSON merged over the generated config: a file, or zero2, zero3_offload, ..."}
    )
    eval_modes: str = field(
        default="answer", metadata={"help": "modes evaluated after each phase, such as answer+think"}
    )
    eval_batch_size: int = 64
    save_steps: int = field(default=0, metadata={"help": "0: at the end of each phase only"})
    keep_checkpoints: int = 2
    max_skipped_steps: int = field(
        default=5, metadata={"help": "steps in a row whose loss or gradient may be non-finite; they are skipped"}
    )
    stall_timeout_s: float = field(
        default=1800.0, metadata={"help": "seconds after which a silent rank, or no progress of any, ends the run"}
    )
    stop_grace_s: float = field(
        default=30.0, metadata={"help": "seconds from SIGTERM until the process ends even without its checkpoint"}
    )
    local_rank: int = field(default=0, metadata={"help": "set by the deepspeed launcher"})

    def __post_init__(self) -> None:
        parse_phases(self.phases)
        for name in (
            "prompts_per_device", "sft_prompts_per_device", "gradient_accumulation_steps", "max_tokens_per_row",
            "eval_batch_size", "keep_checkpoints",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        rate = self.learning_rate
        _require(rate > 0 and math.isfinite(rate), "learning_rate", rate, "positive")
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "in [0, 1]")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "zero or more")
        _require(0 <= self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "in [0, 1)")
        _require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "zero (off) or more")
        _require(self.save_steps >= 0, "save_steps", self.save_steps, "zero or more")
        _require(self.max_skipped_steps >= 0, "max_skipped_steps", self.max_skipped_steps, "zero or more")
        for name in ("stall_timeout_s", "stop_grace_s"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for mode in self.eval_modes.split("+"):
            _require(mode in MODES, "eval_modes", self.eval_modes, f"modes of {', '.join(MODES)} joined by +")


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig
    train: TrainConfig

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Settings by section, ready for JSON."""
        return dataclasses.asdict(self)
