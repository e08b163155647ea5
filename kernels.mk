# The CUDA kernels: included by the Makefile, and called by CMakeLists.txt. CUDA=0 builds without them, with the same interface.

CUDA ?= 1
ifneq ($(CUDA),0)
GO_TAGS := cuda
KERNELS := $(patsubst cuda/kernels/%.cu,cuda/image/%.fatbin,$(wildcard cuda/kernels/*.cu))
endif

.PHONY: kernels
kernels: $(KERNELS)

# Each architecture's own code, and PTX for newer ones. Expressions mean what they say: see kernels/common.cuh.
GENCODE := $(foreach a,$(shell cat cuda/architectures),-gencode arch=$(patsubst sm_%,compute_%,$(a)),code=$(a))
NVCC_FLAGS := -fatbin -O3 -std=c++17 -fmad=false -ftz=false -prec-div=true --compress-mode=size --threads 2

# Written under another name first, so that what is interrupted is not taken for finished.
define compile
@mkdir -p $(@D)
"$$(cat build/nvcc.path)" $(NVCC_FLAGS) $(GENCODE) $< -o $@.tmp
mv $@.tmp $@
endef
KERNEL_PARTS := $(wildcard cuda/kernels/*.cuh cuda/kernels/*.h) cuda/architectures kernels.mk
cuda/image/%.fatbin: cuda/kernels/%.cu $(KERNEL_PARTS) | build/nvcc.path
	$(compile)

# In a form that racecheck can follow: see kernels/hopper.cuh.
build/racecheck/%.fatbin: NVCC_FLAGS += -DGQ_RACECHECK
build/racecheck/%.fatbin: cuda/kernels/%.cu $(KERNEL_PARTS) | build/nvcc.path
	$(compile)

# A path, so that it is looked for only once; clean forgets it.
build/nvcc.path: cuda/find_nvcc.sh | need-python
	@mkdir -p $(@D)
	sh cuda/find_nvcc.sh $(CURDIR)/build/cuda-toolkit $(PYTHON) > $@.tmp
	mv $@.tmp $@
