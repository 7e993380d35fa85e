"""nemo_slam: Google's SLAM (Bapna et al., 2021, arXiv 2110.10329) as an NVIDIA NeMo collection."""

from nemo_slam import allowlist, extraction

__version__ = "0.1.0"

allowlist.register()
extraction.register()
