"""Losses whose logits lie on several ranks: columns (vocabulary parallel), positions (context parallel), or both.

`ranks`: what the ranks of a group do together; `columns`: who has which columns, and how both sides meet; `sequence`:
who has which positions; `side`: rows as a formula sees them; `call`: the way from a public loss to its formula, which
is the module ``parallel`` in the loss's folder.
"""
