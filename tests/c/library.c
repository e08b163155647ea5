/* What is there without arguments: version, names, tables. */
#include "check.h"

int main(void) {
    /* First of all calls, while the Go runtime may still be starting on its own thread. */
    CHECK(strcmp(gq_version(), GQ_TEST_VERSION) == 0, "version %s, want %s", gq_version(), GQ_TEST_VERSION);
    CHECK(gq_abi_version() == GQ_ABI_VERSION, "abi version %d", (int)gq_abi_version());
    CHECK(strcmp(gq_last_error(), "") == 0, "an error before the first call: %s", gq_last_error());

    const char *info = gq_build_info();
    CHECK(info[0] == '{' && info[strlen(info) - 1] == '}', "build info %s", info);
    CHECK(strstr(info, "\"version\"") && strstr(info, "\"go\"") && strstr(info, "\"cpu\"") && strstr(info, "\"cuda\""), "build info %s", info);
    CHECK(info == gq_build_info(), "the text moved");

    static const char *const names[] = {
        "GQ_OK", "GQ_ERROR_INVALID_ARGUMENT", "GQ_ERROR_INVALID_HANDLE", "GQ_ERROR_NOT_FOUND", "GQ_ERROR_IO",
        "GQ_ERROR_BAD_FILE", "GQ_ERROR_UNSUPPORTED", "GQ_ERROR_OUT_OF_MEMORY", "GQ_ERROR_CANCELLED",
        "GQ_ERROR_FAILED", "GQ_ERROR_DEVICE", "GQ_ERROR_FORKED", "GQ_ERROR_INTERNAL",
    };
    for (int i = 0; i < 13; i++) CHECK(strcmp(gq_status_name(i), names[i]) == 0, "%d is %s", i, gq_status_name(i));
    static const int unknown[] = {-1, 13, INT32_MIN, INT32_MAX};
    for (int i = 0; i < 4; i++)
        CHECK(strcmp(gq_status_name(unknown[i]), "GQ_ERROR_UNKNOWN") == 0, "%d is %s", unknown[i], gq_status_name(unknown[i]));

    int32_t devices = -1;
    OK(gq_device_count(&devices));
    CHECK(devices >= 0, "%d devices", (int)devices);

    static const struct {
        const char *name;
        gq_format format;
        int bits, codebook_size;
    } formats[] = {
        {"nf4", GQ_FORMAT_NF4, 4, 16},
        {"fp4", GQ_FORMAT_FP4, 4, 16},
        {"int8", GQ_FORMAT_INT8, 8, 0},
        {"blockwise8", GQ_FORMAT_BLOCKWISE8, 8, 256},
    };
    int32_t count = 0;
    OK(gq_format_count(&count));
    CHECK(count == 4, "%d formats", (int)count);
    for (int i = 0; i < 4; i++) {
        gq_format format = 0;
        OK(gq_format_by_name(formats[i].name, &format));
        CHECK(format == formats[i].format, "%s is %d", formats[i].name, (int)format);
        gq_format_info f = GQ_FORMAT_INFO_INIT;
        OK(gq_format_get_info(format, &f));
        CHECK(f.format == format && strcmp(f.name, formats[i].name) == 0, "format %d is %s", (int)f.format, f.name);
        CHECK(f.bits == formats[i].bits && f.codebook_size == formats[i].codebook_size, "%s: %d bits, codebook of %d",
              f.name, (int)f.bits, (int)f.codebook_size);
    }
    gq_format format = 7;
    STATUS(gq_format_by_name("nf5", &format), GQ_ERROR_NOT_FOUND);
    SAYS("nf5");
    CHECK(format == 0, "format %d after a failure", (int)format);

    static const char *const codebooks[] = {"dynamic", "dynamic_unsigned", "linear", "fp8_e4m3", "fp8_e5m2"};
    for (int i = 0; i < 5; i++) {
        float table[257];
        table[256] = 42;
        OK(gq_codebook(codebooks[i], table, 256));
        for (int k = 1; k < 256; k++) CHECK(table[k - 1] <= table[k], "%s descends at %d", codebooks[i], k);
        CHECK(table[255] == 1 && table[256] == 42, "%s ends with %g, then %g", codebooks[i], table[255], table[256]);
    }
    float table[256];
    STATUS(gq_codebook("dynamite", table, 256), GQ_ERROR_NOT_FOUND);
    SAYS("dynamite");
    return check_result();
}
