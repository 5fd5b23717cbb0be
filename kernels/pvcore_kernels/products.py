"""A product that no flag of the process rounds, also inside a step that a compiler traces.

    product(h, m) -> h @ m

`h [..., d]` in any dtype, `m [d, k]` in that of the sums. Where a process allows TF32, a traced
product on CUDA keeps ten bits of a factor, and a flag cannot be set within the trace: to a compiler
this op is opaque, and it sets the flag itself. It has no gradients.
"""

from torch import Tensor

from pvcore_kernels.reference import precise
from pvcore_kernels.registry import register


def _product(h: Tensor, m: Tensor) -> Tensor:
    with precise(h.device):
        return h.to(m.dtype) @ m


def _product_fake(h: Tensor, m: Tensor) -> Tensor:
    return m.new_empty(*h.shape[:-1], m.shape[-1])


product = register("product(Tensor h, Tensor m) -> Tensor", run=_product, fake=_product_fake)
