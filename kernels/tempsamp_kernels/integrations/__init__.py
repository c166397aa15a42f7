"""These kernels under trainers of other projects.

TRL and verl look their fused head up in a module: `patch_trl()` and `patch_verl()` rebind that name and return a
`Patch` that puts the original back, by `undo()` or at the end of a `with` block.

Trainers in the manner of TimeZero, Video-R1 and EasyR1, which hold the logits of the completion, need no patch but the
three lines of kernels/README.md.
"""

from tempsamp_kernels.integrations.patch import Patch
from tempsamp_kernels.integrations.trl import patch_trl
from tempsamp_kernels.integrations.verl import patch_verl

__all__ = ["Patch", "patch_trl", "patch_verl"]
