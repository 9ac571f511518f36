"""A model of the CUDA kernels' time: their machine code runs here, instruction by instruction, and is counted.

* `sass` reads nvcc's machine code, and `encode` turns it into the records that `run.cpp` runs with its headers;
* `launches` calls the launchers of csrc/cuda, which say what a GPU would be asked for, and runs that;
* `gpus` has the figures of the GPUs, `report` makes times of counts, and `__main__` is the program.
"""
