"""The wheel's packages; everything else is in ``setup.cfg``.

A checkout has the configs and the tools beside the package, an installation has them inside.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["dpa_xtuner*"]),
        "dpa_xtuner.configs",
        "dpa_xtuner.configs._base_",
        "dpa_xtuner.tools",
    ],
    package_dir={"dpa_xtuner.configs": "configs", "dpa_xtuner.tools": "tools"},
)
