"""Maps the top-level folder `integrations/` to `ultraedit_kernels.integrations`; all else is in pyproject.toml."""

from setuptools import find_packages, setup

packages = find_packages(include=["ultraedit_kernels", "ultraedit_kernels.*"])
packages += [f"ultraedit_kernels.{name}" for name in find_packages(include=["integrations", "integrations.*"])]

setup(packages=packages, package_dir={"ultraedit_kernels.integrations": "integrations"})
