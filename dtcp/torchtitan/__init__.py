"""torchtitan's Trainer with our models, plans and batch sharding: the only importer of torchtitan.

`compat` comes first: torchtitan binds its device when it is imported.
"""

from dtcp.torchtitan import compat as compat
