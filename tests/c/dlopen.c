/* The library stays once it is loaded: dlclose does nothing, and dlopen gives it back. usage: dlopen LIBRARY */
#include "check.h"

#include <dlfcn.h>

static void *library;

/* dlsym gives an object pointer, which C99 cannot cast to a function pointer. */
static void find(const char *name, void *function) {
    void *symbol = dlsym(library, name);
    CHECK(symbol != NULL, "%s: %s", name, dlerror());
    memcpy(function, &symbol, sizeof symbol);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    const char *(*version)(void), *(*last_error)(void);
    gq_status (*quantize)(gq_addr, gq_dtype, int64_t, int64_t, gq_addr, int64_t, gq_addr, size_t, const gq_exec *);
    void *first = NULL;
    for (int round = 0; round < 20; round++) {
        library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        find("gq_version", &version);
        find("gq_last_error", &last_error);
        find("gq_quantize_nf4", &quantize);
        /* The first call of all: the Go runtime may still be starting. */
        CHECK(strcmp(version(), GQ_TEST_VERSION) == 0, "round %d: version \"%s\"", round, version());
        CHECK(first == NULL || first == dlsym(library, "gq_version"), "round %d: the library moved", round);
        first = dlsym(library, "gq_version");
        for (int closed = 0; closed < 2; closed++) {
            float weight[64] = {1, -1, 0.5f}, absmax = 0;
            unsigned char packed[32];
            CHECK(quantize(GQ_ADDR(weight), GQ_F32, 64, 64, GQ_ADDR(&absmax), 1, GQ_ADDR(packed), 32, NULL) == GQ_OK, "%s", last_error());
            CHECK(absmax == 1 && packed[0] == 0xf0, "round %d: absmax %g, codes %02x", round, absmax, packed[0]);
            CHECK(quantize(0, GQ_F32, 64, 64, 0, 1, 0, 32, NULL) == GQ_ERROR_INVALID_ARGUMENT, "NULL is accepted");
            CHECK(strstr(last_error(), "src"), "%s", last_error());
            if (!closed) CHECK(dlclose(library) == 0, "%s", dlerror());
        }
    }
    return check_result();
}
