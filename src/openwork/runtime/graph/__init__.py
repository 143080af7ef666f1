"""Convolutional networks as native programs: traced, folded, laid out channel by channel, run without a Python call a layer.

`read` turns a traced forward into operations and islands of them, `ops` says what each operation needs and how it runs,
`compile` lays an island out for one input shape, `island` runs it in place of the layers.
"""
