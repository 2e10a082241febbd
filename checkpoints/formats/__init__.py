"""Every format that the converter reads or writes, behind two interfaces.

A reader parses a format's *index* and says where the elements of each tensor lie
(``source.Source``, mostly as an ``extent_source.ExtentSource``); a writer says which
files it would write and what each holds (``sink.Sink``). Moving bytes, hashing,
resuming, verifying and reporting are the converter's and are the same for all.
"""
