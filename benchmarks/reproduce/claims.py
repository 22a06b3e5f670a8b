"""All claims by name, in the order of the page."""

from . import ablation, efficiency, memory, noise, overhead, places, shots

CLAIMS = {module.CLAIM.name: module.CLAIM for module in (efficiency, places, ablation, noise, shots, memory, overhead)}
