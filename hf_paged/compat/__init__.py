"""Every private name of transformers and torch that hf_paged touches, under a plain one.

The rest of the package names no attribute of theirs that begins with an underscore. What a version lacks or renames
is found here, by what is there (``hasattr``, a signature) and never by a version number. `symbols` declares the names.
"""
