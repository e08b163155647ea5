# libgquant, the C library: included by the Makefile. CMakeLists.txt does the same from CMake, with the same go commands.

LIBRARY_VERSION := $(shell sed -n 's/^project.gquant VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
SONAME := libgquant.so.0
PREFIX ?= /usr/local
# Below PREFIX.
LIBDIR ?= lib
INCLUDEDIR ?= include
CTEST ?= -j2 --output-on-failure

.PHONY: lib install ctest racecheck-lib

lib: lib/libgquant.so lib/libgquant.a

# Only the functions of include/gquant.h are visible, and what was loaded stays: the Go runtime cannot leave a process. A library is
# built in an empty folder, because go keeps one that differs in nothing but the version script and writes a header of its own
# beside it, and then takes the place of the old one, which a program may be using.
GO_LIBRARY = CGO_ENABLED=1 $(GO) build -trimpath -tags "$(GO_TAGS)"
GO_SHARED = $(GO_LIBRARY) -buildmode=c-shared -ldflags "-s -w -X main.version=$(LIBRARY_VERSION) -extldflags '-Wl,-soname,$(SONAME) -Wl,-z,nodelete \"-Wl,--version-script=$(CURDIR)/capi/gquant.map\"'"
lib/libgquant.so: FORCE $(KERNELS) | need-go need-cc
	rm -rf lib/shared
	$(GO_SHARED) -o lib/shared/libgquant.so ./capi
	mv lib/shared/libgquant.so $@
	ln -sf libgquant.so lib/$(SONAME)
	rm -r lib/shared

# The library with kernels that racecheck can follow.
racecheck-lib: build/racecheck/linear_hopper.fatbin $(KERNELS) | need-go need-cc
	rm -rf lib/racecheck
	echo '{"Replace": {"$(CURDIR)/cuda/image/linear_hopper.fatbin": "$(CURDIR)/$<"}}' > build/racecheck/overlay.json
	$(GO_SHARED) -overlay build/racecheck/overlay.json -o lib/racecheck/$(SONAME) ./capi

lib/libgquant.a: FORCE $(KERNELS) | need-go need-cc
	rm -rf lib/static
	$(GO_LIBRARY) -buildmode=c-archive -ldflags "-s -w -X main.version=$(LIBRARY_VERSION)" -o lib/static/libgquant.a ./capi
	mv lib/static/libgquant.a $@
	rm -r lib/static

# Paths in the installed files are relative to these files, so that the tree may be moved.
relative = $(shell realpath -m --relative-to=/p/$(1) /p/$(2))
CONFIGURE = sed -e 's|@VERSION@|$(LIBRARY_VERSION)|; s|@SONAME@|$(SONAME)|; s|@LIBDIR@|$(LIBDIR)|; s|@INCLUDEDIR@|$(INCLUDEDIR)|' \
  -e 's|@PREFIX_FROM_PKGCONFIG@|$(call relative,$(LIBDIR)/pkgconfig,)|' \
  -e 's|@LIB_FROM_CONFIG@|$(call relative,$(LIBDIR)/cmake/gquant,$(LIBDIR))|' \
  -e 's|@INCLUDE_FROM_CONFIG@|$(call relative,$(LIBDIR)/cmake/gquant,$(INCLUDEDIR))|'

install: TO = $(DESTDIR)$(PREFIX)
install: lib
	install -d "$(TO)/$(INCLUDEDIR)" "$(TO)/$(LIBDIR)/pkgconfig" "$(TO)/$(LIBDIR)/cmake/gquant"
	install -m 644 include/gquant.h "$(TO)/$(INCLUDEDIR)"
	install -m 755 lib/libgquant.so "$(TO)/$(LIBDIR)/$(SONAME)"
	ln -sf $(SONAME) "$(TO)/$(LIBDIR)/libgquant.so"
	install -m 644 lib/libgquant.a "$(TO)/$(LIBDIR)"
	$(CONFIGURE) gquant.pc.in > "$(TO)/$(LIBDIR)/pkgconfig/gquant.pc"
	$(CONFIGURE) cmake/gquantConfig.cmake.in > "$(TO)/$(LIBDIR)/cmake/gquant/gquantConfig.cmake"
	$(CONFIGURE) cmake/gquantConfigVersion.cmake.in > "$(TO)/$(LIBDIR)/cmake/gquant/gquantConfigVersion.cmake"

# The tests in C.
ctest: | need-go need-cc
	@command -v cmake >/dev/null || { echo "the tests in C need CMake 3.20 or later" >&2; exit 1; }
	cmake -S . -B build/cmake
	cmake --build build/cmake -j2
	ctest --test-dir build/cmake $(CTEST)
