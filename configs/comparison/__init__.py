"""The comparison of methods: configs of several sizes, and the sweeps over methods (docs/reproducing.md)."""
