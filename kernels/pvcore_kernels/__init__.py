"""The mathematics of projection space, and the kernels that run it. Knows tensors, no models."""

from pvcore_kernels.paths import path_taken as path_taken
from pvcore_kernels.reference import AblateStep as AblateStep
from pvcore_kernels.reference import AddStep as AddStep
from pvcore_kernels.reference import CapStep as CapStep
from pvcore_kernels.reference import Gate as Gate
from pvcore_kernels.reference import Step as Step
from pvcore_kernels.reference import add as add
from pvcore_kernels.reference import coefficients as coefficients
from pvcore_kernels.reference import intervene as intervene
from pvcore_kernels.reference import joint_inverse as joint_inverse
from pvcore_kernels.reference import opened as opened
from pvcore_kernels.routes import project as project
from pvcore_kernels.routes import project_layers as project_layers
from pvcore_kernels.routes import segment_mean as segment_mean
