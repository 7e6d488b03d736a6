"""The Flower app that travels: names of what to run, and no code of its own.

Server and devices have the package installed; Flower carries the rest.
"""

from __future__ import annotations

from pathlib import Path

from alignfed.deploy.pki import write_public
from alignfed.version import __version__

SERVER = "alignfed.deploy.server_app"
CLIENT = "alignfed.deploy.client_app"

_PROJECT = """\
[project]
name = "alignfed-deployment"
version = "{version}"
description = "Asynchronous federated LoRA fine-tuning. The package does the work."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "alignfed"

[tool.flwr.app.components]
serverapp = "thin.server:app"
clientapp = "thin.client:app"

[tool.flwr.app.config]
"""

_MODULE = """\
from {module} import app

__all__ = ["app"]
"""


def write_app(folder: Path) -> Path:
    """Write the app into a folder, made if missing, and return the folder.

    Raises:
        DeploymentError: it cannot be written.
    """
    # Flower takes three numbers, where ours may end in a suffix such as dev0.
    numbers = [part for part in __version__.split(".") if part.isdigit()]
    version = ".".join((*numbers, "0", "0")[:3])
    texts = {
        "pyproject.toml": _PROJECT.format(version=version),
        "thin/__init__.py": "",
        "thin/server.py": _MODULE.format(module=SERVER),
        "thin/client.py": _MODULE.format(module=CLIENT),
    }
    for name, text in texts.items():
        write_public(folder / name, text.encode("utf-8"), replace=True)
    return folder
