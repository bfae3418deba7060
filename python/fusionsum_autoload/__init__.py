"""The function that torch calls at the end of `import torch`, by its group of entry points ``torch.backends``.

It is a package of its own because importing a module of fusionsum imports all of fusionsum, and users of torch who do not
use fusionsum must not pay for it. What lives elsewhere: the registration (``fusionsum/autoload.py``).
"""

import sys


def register() -> None:
    """Register fusionsum's operations if fusionsum was imported before torch; otherwise `import fusionsum` does."""
    autoload = sys.modules.get("fusionsum.autoload")
    if autoload is not None:
        autoload.register()
