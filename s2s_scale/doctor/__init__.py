"""Is this machine fit for a profile? ``checks`` looks, ``parity`` computes and compares.

``figures`` is what each rank of a parity run does; ``report`` prints.
"""

from __future__ import annotations
