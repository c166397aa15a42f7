"""These kernels under trainers of other projects.

TRL and verl look their fused head up in a module: `patch_trl()` and `patch_verl()` rebind that name and return a
`Patch` that puts the original back, by `undo()` or at the end of a `with` block, and says where it applies.

Trainers that hold the logits, as TimeZero, Video-R1, EasyR1 and OpenRLHF do, and those with a head or a loss of their
own, as prime-rl and ms-swift, need no patch but the lines of kernels/README.md.
"""

from tempsamp_kernels.integrations.patch import Patch
from tempsamp_kernels.integrations.trl import patch_trl
from tempsamp_kernels.integrations.verl import patch_verl

__all__ = ["Patch", "patch_trl", "patch_verl"]
