/* See ultraedit_kernels.h. The table of kernels is table.h, written by ultraedit_kernels/ops/aot.py. */
#include "ultraedit_kernels.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "table.h"

#define MAX_DEVICES 64
#define MAX_PARAMS 4096 /* bytes that every driver accepts */

/* CUDA's and HIP's driver interfaces are alike; what differs is below. Neither header is needed. */
typedef struct {
  bool hip;
  int (*init)(unsigned);
  int (*device_count)(int *);
  int (*module_load)(void **, const void *);
  int (*module_function)(void **, void *, const char *);
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                void *, void **, void **);
  /* CUDA only */
  int (*error_string)(int, const char **);
  int (*device_attribute)(int *, int, int);
  int (*function_attribute)(void *, int, int);
  int (*context_retain)(void **, int);
  int (*context_current)(void **);
  int (*context_push)(void *);
  int (*context_pop)(void **);
  /* HIP only */
  const char *(*hip_error_string)(int);
  int (*device_properties)(void *, int);
  int (*get_device)(int *);
  int (*set_device)(int);
} driver_t;

enum { /* cuda.h, hip_runtime_api.h */
  CUDA_CAPABILITY_MAJOR = 75,
  CUDA_CAPABILITY_MINOR = 76,
  CUDA_MAX_DYNAMIC_SHARED = 8,
  CUDA_DEFAULT_SHARED = 48 * 1024,
  HIP_PROPERTIES_SIZE = 1472, /* hipDeviceProp_tR0600 */
  HIP_PROPERTIES_ARCH = 1160, /* offset of its gcnArchName, e.g. "gfx942:sramecc+:xnack-" */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static driver_t driver; /* complete once `ready`; written under the lock */
static atomic_bool ready;
static struct {
  void *context; /* CUDA: the primary context */
  char arch[ULTRAEDIT_ARCH_SIZE];
  atomic_bool ready;
} devices[MAX_DEVICES];
static _Atomic(void *) functions[ULTRAEDIT_ROWS][MAX_DEVICES];

static _Thread_local char message[512];

#define FAIL(...) return (snprintf(message, sizeof message, __VA_ARGS__), message)

/* Return the driver's error, if any, from a function that returns an error text. */
#define CHECK(call, what)                                                  \
  do {                                                                     \
    int status = (call);                                                   \
    if (status) FAIL("%s failed: %s", what, describe(status));             \
  } while (0)

static const char *describe(int status) {
  const char *text = NULL;
  if (driver.hip) text = driver.hip_error_string(status);
  else if (driver.error_string(status, &text)) text = NULL;
  return text ? text : "unknown error";
}

static void *open_first(const char *const *names, int flags) {
  for (; *names; names++) {
    void *handle = dlopen(*names, RTLD_NOW | flags);
    if (handle) return handle;
  }
  return NULL;
}

/* Under the lock. What the process has loaded already (PyTorch's runtime) goes first. */
static const char *open_driver(void) {
  static const char *const cuda[] = {"libcuda.so.1", NULL};
  static const char *const hip[] = {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", NULL};
  if (atomic_load(&ready)) return NULL;
  memset(&driver, 0, sizeof driver);
  void *handle = open_first(cuda, RTLD_NOLOAD);
  if (!handle && (handle = open_first(hip, RTLD_NOLOAD))) driver.hip = true;
  if (!handle) handle = open_first(cuda, 0);
  if (!handle && (handle = open_first(hip, 0))) driver.hip = true;
  if (!handle)
    FAIL("no GPU driver: neither libcuda.so.1 nor libamdhip64.so can be opened; expected a machine "
         "with a GPU and its driver");

  const struct {
    void *slot;
    const char *cuda, *hip;
  } symbols[] = {
      {&driver.init, "cuInit", "hipInit"},
      {&driver.device_count, "cuDeviceGetCount", "hipGetDeviceCount"},
      {&driver.module_load, "cuModuleLoadData", "hipModuleLoadData"},
      {&driver.module_function, "cuModuleGetFunction", "hipModuleGetFunction"},
      {&driver.launch, "cuLaunchKernel", "hipModuleLaunchKernel"},
      {&driver.error_string, "cuGetErrorString", NULL},
      {&driver.device_attribute, "cuDeviceGetAttribute", NULL},
      {&driver.function_attribute, "cuFuncSetAttribute", NULL},
      {&driver.context_retain, "cuDevicePrimaryCtxRetain", NULL},
      {&driver.context_current, "cuCtxGetCurrent", NULL},
      {&driver.context_push, "cuCtxPushCurrent_v2", NULL},
      {&driver.context_pop, "cuCtxPopCurrent_v2", NULL},
      {&driver.hip_error_string, NULL, "hipGetErrorString"},
      {&driver.device_properties, NULL, "hipGetDevicePropertiesR0600"},
      {&driver.get_device, NULL, "hipGetDevice"},
      {&driver.set_device, NULL, "hipSetDevice"},
  };
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
    const char *name = driver.hip ? symbols[i].hip : symbols[i].cuda;
    if (!name) continue;
    void *symbol = dlsym(handle, name);
    if (!symbol) FAIL("the GPU driver has no %s; update it", name);
    memcpy(symbols[i].slot, &symbol, sizeof symbol);
  }
  CHECK(driver.init(0), "starting the GPU driver");
  atomic_store(&ready, true);
  return NULL;
}

/* Under the lock. */
static const char *open_device(int device) {
  if (atomic_load(&devices[device].ready)) return NULL;
  const char *error = open_driver();
  if (error) return error;
  int count = 0;
  CHECK(driver.device_count(&count), "counting the GPUs");
  if (device >= count)
    FAIL("device is %d, expected one of the %d that the driver sees", device, count);
  char *arch = devices[device].arch;
  if (driver.hip) {
    char properties[HIP_PROPERTIES_SIZE];
    CHECK(driver.device_properties(properties, device), "reading the GPU's architecture");
    snprintf(arch, ULTRAEDIT_ARCH_SIZE, "%.15s", properties + HIP_PROPERTIES_ARCH);
    arch[strcspn(arch, ":")] = 0;
  } else {
    int major = 0, minor = 0;
    CHECK(driver.device_attribute(&major, CUDA_CAPABILITY_MAJOR, device),
          "reading the GPU's architecture");
    CHECK(driver.device_attribute(&minor, CUDA_CAPABILITY_MINOR, device),
          "reading the GPU's architecture");
    snprintf(arch, ULTRAEDIT_ARCH_SIZE, "sm_%d%d", major, minor);
    CHECK(driver.context_retain(&devices[device].context, device), "opening the GPU's context");
  }
  atomic_store(&devices[device].ready, true);
  return NULL;
}

static const char *use_device(int device) {
  if (device < 0 || device >= MAX_DEVICES)
    FAIL("device is %d, expected 0 to %d", device, MAX_DEVICES - 1);
  if (atomic_load(&devices[device].ready)) return NULL;
  pthread_mutex_lock(&lock);
  const char *error = open_device(device);
  pthread_mutex_unlock(&lock);
  return error;
}

/* Under the lock, with the device current. */
static const char *load(const ultraedit_kernel *kernel, _Atomic(void *) *slot) {
  void *module = NULL, *function = NULL;
  if (atomic_load(slot)) return NULL;
  CHECK(driver.module_load(&module, kernel->code), "loading a kernel");
  CHECK(driver.module_function(&function, module, kernel->name), "finding a kernel in its code");
  if (!driver.hip && kernel->shared > CUDA_DEFAULT_SHARED)
    CHECK(driver.function_attribute(function, CUDA_MAX_DYNAMIC_SHARED, (int)kernel->shared),
          "reserving shared memory");
  atomic_store(slot, function);
  return NULL;
}

/* With the device current. */
static const char *run(const ultraedit_kernel *kernel, int device, unsigned grid_x, unsigned grid_y,
                       unsigned grid_z, const void *args, void *stream) {
  _Atomic(void *) *slot = &functions[kernel - ultraedit_table][device];
  if (!atomic_load(slot)) {
    pthread_mutex_lock(&lock);
    const char *error = load(kernel, slot);
    pthread_mutex_unlock(&lock);
    if (error) return error;
  }
  _Alignas(16) char params[MAX_PARAMS];
  memcpy(params, args, kernel->args_size);
  memset(params + kernel->args_size, 0, kernel->params_size - kernel->args_size);
  size_t size = kernel->params_size;
  /* {BUFFER_POINTER, ..., BUFFER_SIZE, ..., END}; HIP ends with another number. */
  void *extra[] = {(void *)1, params, (void *)2, &size, (void *)(size_t)(driver.hip ? 3 : 0)};
  CHECK(driver.launch(atomic_load(slot), grid_x, grid_y, grid_z, kernel->threads, 1, 1,
                      kernel->shared, stream, NULL, extra),
        "launching a kernel");
  return NULL;
}

const char *ultraedit_build(void) { return ULTRAEDIT_BUILD; }

const ultraedit_kernel *ultraedit_kernels(size_t *count) {
  *count = ULTRAEDIT_ROWS;
  return ultraedit_table;
}

static bool matches(const char *wanted, const char *got) { return !wanted || !strcmp(wanted, got); }

const ultraedit_kernel *ultraedit_find(const char *arch, const char *name, const char *signature,
                                       const char *constants) {
  for (size_t i = 0; i < ULTRAEDIT_ROWS; i++) {
    const ultraedit_kernel *k = &ultraedit_table[i];
    if (matches(arch, k->arch) && matches(name, k->name) && matches(signature, k->signature) &&
        matches(constants, k->constants))
      return k;
  }
  return NULL;
}

const char *ultraedit_device_arch(int device, char arch[ULTRAEDIT_ARCH_SIZE]) {
  const char *error = use_device(device);
  if (!error) memcpy(arch, devices[device].arch, ULTRAEDIT_ARCH_SIZE);
  return error;
}

const char *ultraedit_launch(const ultraedit_kernel *kernel, int device, unsigned grid_x,
                             unsigned grid_y, unsigned grid_z, const void *args, size_t args_size,
                             void *stream) {
  if (kernel < ultraedit_table || kernel >= ultraedit_table + ULTRAEDIT_ROWS)
    FAIL("kernel is not in the table, expected what ultraedit_find returned, not NULL or a copy");
  const char *error = use_device(device);
  if (error) return error;
  if (strcmp(kernel->arch, devices[device].arch))
    FAIL("%s was compiled for %s, but device %d is %s; code runs on exactly its own architecture",
         kernel->name, kernel->arch, device, devices[device].arch);
  if (args_size != kernel->args_size)
    FAIL("args has %zu bytes, %s takes %u: %s", args_size, kernel->name, kernel->args_size,
         kernel->signature);
  if (!grid_x || !grid_y || !grid_z) return NULL;

  if (driver.hip) {
    int before = device;
    CHECK(driver.get_device(&before), "reading the current GPU");
    if (before != device) CHECK(driver.set_device(device), "selecting a GPU");
    error = run(kernel, device, grid_x, grid_y, grid_z, args, stream);
    if (before != device) driver.set_device(before);
    return error;
  }
  void *before = NULL, *context = devices[device].context;
  CHECK(driver.context_current(&before), "reading the current context");
  if (before != context) CHECK(driver.context_push(context), "selecting a GPU");
  error = run(kernel, device, grid_x, grid_y, grid_z, args, stream);
  if (before != context) driver.context_pop(&before);
  return error;
}
