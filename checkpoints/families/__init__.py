"""What tensors a model of transformers has: data, read by checkpoints.model_tensors.

``tensors`` is name -> shape, extents by formula over config.json, separated by commas.
``if A and B`` at the end makes it depend on conditions: ``sparse`` and ``dense`` (has
this layer experts?) and those of ``flags_of``. ``{L}`` runs over layers, ``{E}`` over
experts.
"""
