"""The runtime: sparse weights packed into small files and run by whatever is fastest on the machine at hand.

It knows weights and zeros, not methods: `files` and `packing` make files small, `formats` multiply with packed weights,
`plan` measures and chooses, `modules` puts the winners in place of dense layers.
"""
