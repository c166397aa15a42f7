"""These kernels under trainers of other projects.

TRL and verl look their fused head up in a module: `patch_trl()` and `patch_verl()` rebind that name and return a
`Patch` that puts the original back, by `undo()` or at the end of a `with` block.

Trainers in the manner of TimeZero, Video-R1 and EasyR1 hold the logits of the completion. They need no patch but three
lines in place of their log-softmax, ratio, clip and KL; the reference's log-probs come from the same kernel:

    logits = model(**inputs, logits_to_keep=completion_ids.shape[1] + 1).logits
    loss, metrics = triton_grpo_loss(logits, None, ref_logps, completion_ids, advantages, completion_mask,
                                     temperature=1.0, beta=beta, loss_type="grpo", reduce=True)

    ref_logps = fused_selective_log_softmax(ref_logits, completion_ids, 1.0, completion_mask)  # under no_grad
"""

from tempsamp_kernels.integrations.patch import Patch
from tempsamp_kernels.integrations.trl import patch_trl
from tempsamp_kernels.integrations.verl import patch_verl

__all__ = ["Patch", "patch_trl", "patch_verl"]
