"""A pytest plugin: while Liger-Kernel's own tests run, its class and functions of the GRPO loss are ours.

pytest -p bench.rivals_plugin test/chunked_loss/test_grpo_loss.py
"""

import liger_kernel.chunked_loss
import liger_kernel.chunked_loss.grpo_loss
import liger_kernel.ops.grpo_loss
import liger_kernel.transformers.grpo_loss
from tempsamp_kernels import FusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss

for module, name, ours in (
    (liger_kernel.chunked_loss, "LigerFusedLinearGRPOLoss", FusedLinearGRPOLoss),
    (liger_kernel.chunked_loss.grpo_loss, "LigerFusedLinearGRPOLoss", FusedLinearGRPOLoss),
    (liger_kernel.transformers.grpo_loss, "triton_grpo_loss", triton_grpo_loss),
    (liger_kernel.ops.grpo_loss, "fused_selective_log_softmax", fused_selective_log_softmax),
):
    setattr(module, name, ours)
