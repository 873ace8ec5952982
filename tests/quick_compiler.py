"""Flags for XLA on CPU under which programs compile several times faster, and run slower.

The tests compile many programs and run each for an instant: no costly passes of LLVM, no pass pipeline of MLIR for each
fusion (most of the compile time from jax 0.11 on), and no parts of a program for threads to compile.
"""

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
)
