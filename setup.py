"""Maps the folder `integrations/` to `ultraedit_kernels.integrations`; see pyproject.toml."""

from setuptools import find_packages, setup

integrations = find_packages(include=["integrations", "integrations.*"])

setup(
    packages=[
        *find_packages(include=["ultraedit_kernels", "ultraedit_kernels.*"]),
        *(f"ultraedit_kernels.{name}" for name in integrations),
    ],
    package_dir={"ultraedit_kernels.integrations": "integrations"},
)
