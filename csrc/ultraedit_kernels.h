/* UltraEdit's GPU kernels, compiled ahead of time: find the code for a device and launch it.

   Needs neither the CUDA toolkit nor ROCm to build, nor Triton or a compiler to run. The driver's
   library (libcuda.so.1 or libamdhip64.so) is opened by the first call that needs a device.

   Functions that can fail return NULL on success, else what went wrong: a text that belongs to the
   calling thread and holds until its next call. All functions may be called from any thread.

       char arch[ULTRAEDIT_ARCH_SIZE];
       const char *error = ultraedit_device_arch(0, arch);
       const ultraedit_kernel *kernel = ultraedit_find(arch, "gram_kernel",
           "*fp32:D *fp64:D i32 i32:D i32 i32:D 1", NULL);
       struct { const float *h; double *gram; int32_t n, d, blocks, stride_n; } args = {...};
       error = ultraedit_launch(kernel, 0, 10, 10, 9, &args, sizeof args, stream);
*/
#ifndef ULTRAEDIT_KERNELS_H
#define ULTRAEDIT_KERNELS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define ULTRAEDIT_ARCH_SIZE 16

/* A kernel, specialised and compiled for one architecture. */
typedef struct ultraedit_kernel {
  const char *name;
  /* One word per argument of the Triton kernel: "*bf16" for a pointer, "i32", "i64", "fp64", ...
     ":D": divisible by 16 (a pointer: its address). "S": the tensor's storage is within 2 GB.
     "1": always 1, and not passed. */
  const char *signature;
  /* Block sizes and the like, as "NAME=value" in alphabetical order. */
  const char *constants;
  /* "sm_90", "gfx942", ... Code runs on exactly this architecture. */
  const char *arch;
  unsigned threads;     /* per program */
  unsigned shared;      /* bytes of dynamic shared memory per program */
  unsigned args_size;   /* bytes of the arguments, packed as a C struct of them */
  unsigned params_size; /* the same with Triton's scratch pointers, which are passed as null */
  const void *code;     /* a cubin or hsaco file */
  size_t code_size;
} ultraedit_kernel;

/* "VERSION SOURCES TRITON": of the package, a digest of the kernels' sources, and of Triton. */
const char *ultraedit_build(void);

/* The whole table; `count` receives its length. */
const ultraedit_kernel *ultraedit_kernels(size_t *count);

/* The first kernel of the table with these properties, or NULL. NULL matches any. */
const ultraedit_kernel *ultraedit_find(const char *arch, const char *name, const char *signature,
                                       const char *constants);

/* Write the architecture of a device, e.g. "sm_90". Fails without a driver or device. */
const char *ultraedit_device_arch(int device, char arch[ULTRAEDIT_ARCH_SIZE]);

/* Launch grid_x × grid_y × grid_z programs on a stream (CUstream, hipStream_t) of the device's
   primary context, the one that the runtime API and PyTorch use. `args` points to a C struct of the
   kernel's arguments, without those whose word in the signature is "1"; it is copied. Returns
   without waiting for the kernel. The first launch of a kernel on a device loads its code, which
   must not happen while a stream is captured into a graph. An empty grid is not launched. */
const char *ultraedit_launch(const ultraedit_kernel *kernel, int device, unsigned grid_x,
                             unsigned grid_y, unsigned grid_z, const void *args, size_t args_size,
                             void *stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
