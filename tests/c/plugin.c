/* A shared library that holds libgquant.a, as a plug-in of some program does; dlopen.c loads it. */
#include <gquant.h>

const char *plugin_version(void);

const char *plugin_version(void) { return gq_version(); }
