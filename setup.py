"""Find the packages: `passes/` and `kernels/` lie at the root and install below `moeify`."""

from setuptools import find_namespace_packages, setup


def packages_in(folder: str, package: str) -> list[str]:
    """Return `package` and all packages below its folder, which links and caches are not."""
    below = find_namespace_packages(folder, exclude=["*__pycache__*", "passes*", "kernels*"])
    return [package, *(f"{package}.{name}" for name in below)]


setup(
    packages=[
        *packages_in("moeify", "moeify"),
        *packages_in("passes", "moeify.passes"),
        *packages_in("kernels", "moeify.kernels"),
    ]
)
