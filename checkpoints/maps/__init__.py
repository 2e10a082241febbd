"""Name maps between the forms of model families: data, read by checkpoints.name_maps.

A file describes two forms of the same model. A rule's ``parts`` are tensors of the form
``parts_form``; concatenated along their rows they are one tensor ``whole`` of the form
``whole_form``. Placeholders: ``{L}`` a layer, ``{E}`` an expert, ``{W}`` weight or
bias. A layer or expert that ``whole`` lacks is a leading axis there: its parts are
stacked.

- ``whole`` may be a list: the first is written, all are read;
- ``rows``: rows of each part, formulas over config.json (default: equal shares);
- ``groups``: parts are cut into so many groups of rows, and the groups interleaved;
- ``turned``: ``whole`` is the transpose (matrices only);
- ``crop``: rows of ``whole`` above this number are padding, left out and reported.

``complete = true``: a model tensor that no rule names is refused. ``ignore`` names what
has no counterpart, and why.
"""
