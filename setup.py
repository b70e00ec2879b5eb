"""Maps the folder `integrations/` to `ultraedit_kernels.integrations`; see pyproject.toml.

A wheel holds the ahead-of-time library if CMake has built it before (docs/aot.md), and then fits
its platform only.
"""

from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

LIBRARY = Path(__file__).parent / "ultraedit_kernels" / "libultraedit_kernels.so"


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return LIBRARY.exists()


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        # The library is plain C: any Python takes it.
        return ("py3", "none", platform) if LIBRARY.exists() else (python, abi, platform)


integrations = find_packages(include=["integrations", "integrations.*"])

setup(
    packages=[
        *find_packages(include=["ultraedit_kernels", "ultraedit_kernels.*"]),
        *(f"ultraedit_kernels.{name}" for name in integrations),
    ],
    package_dir={"ultraedit_kernels.integrations": "integrations"},
    cmdclass={"bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
)
