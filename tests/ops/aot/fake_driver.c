/* A stand-in for the GPU driver, built as libcuda.so.1 or (-DHIP) libamdhip64.so: it runs nothing and
   writes what it is asked to do to $FAKE_DRIVER_LOG, one line a call, for the test to read. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *current;
static int modules;

static void say(const char *format, long a, long b, long c, long d) {
  FILE *file = fopen(getenv("FAKE_DRIVER_LOG"), "a");
  fprintf(file, format, a, b, c, d);
  fclose(file);
}

/* extra is {1, pointer, 2, &size, end}. */
static int launched(void *function, unsigned x, unsigned y, unsigned z, unsigned threads,
                    unsigned shared, void *stream, void **extra, size_t end) {
  FILE *file = fopen(getenv("FAKE_DRIVER_LOG"), "a");
  size_t size = *(size_t *)extra[3];
  fprintf(file, "launch %s %u %u %u %u %u %zu %zu %p ", (const char *)function, x, y, z, threads,
          shared, (size_t)stream, (size_t)extra[0] + (size_t)extra[2] + (size_t)extra[4] - end, current);
  for (size_t i = 0; i < size; i++) fprintf(file, "%02x", ((unsigned char *)extra[1])[i]);
  fputc('\n', file);
  fclose(file);
  return 0;
}

static int load(void **module, const void *code) {
  say("load %ld elf %ld\n", ++modules, !memcmp(code, "\177ELF", 4), 0, 0);
  *module = &modules;
  return 0;
}

static int find(void **function, void *module, const char *name) {
  (void)module;
  *function = (void *)name;
  return 0;
}

#ifdef HIP
int hipInit(unsigned flags) { return (int)flags; }
int hipGetDeviceCount(int *count) { return *count = 2, 0; }
int hipModuleLoadData(void **module, const void *code) { return load(module, code); }
int hipModuleGetFunction(void **f, void *module, const char *name) { return find(f, module, name); }
const char *hipGetErrorString(int status) { return status ? "a HIP error" : NULL; }
int hipGetDevice(int *device) { return *device = (int)(size_t)current, 0; }
int hipSetDevice(int device) { return current = (void *)(size_t)device, 0; }
int hipGetDevicePropertiesR0600(char *properties, int device) {
  return strcpy(properties + 1160, device ? "gfx90a:sramecc+" : getenv("FAKE_ARCH")), 0;
}
int hipModuleLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void *stream, void **params, void **extra) {
  (void)params;
  return launched(f, x, y, z, bx * by * bz, shared, stream, extra, 3);
}
#else
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGetCount(int *count) { return *count = 2, 0; }
int cuModuleLoadData(void **module, const void *code) { return load(module, code); }
int cuModuleGetFunction(void **f, void *module, const char *name) { return find(f, module, name); }
int cuGetErrorString(int status, const char **text) { return *text = status ? "an error" : "", 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(size_t)(100 + device), 0; }
int cuCtxGetCurrent(void **context) { return *context = current, 0; }
int cuCtxPushCurrent_v2(void *context) { return current = context, 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = current, current = NULL, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int arch = device ? 87 : atoi(getenv("FAKE_ARCH"));
  return *value = attribute == 75 ? arch / 10 : arch % 10, attribute != 75 && attribute != 76;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  (void)function;
  return say("attribute %ld %ld\n", attribute, value, 0, 0), 0;
}
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
  (void)params;
  return launched(f, x, y, z, bx * by * bz, shared, stream, extra, 0);
}
#endif
