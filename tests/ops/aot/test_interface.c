/* The C interface, as a program without Python sees it. On a machine without a GPU driver it also
   checks that the error says so. */
#include <stdio.h>
#include <string.h>

#include "ultraedit_kernels.h"

#define EXPECT(condition)                                            \
  do {                                                               \
    if (!(condition)) {                                              \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      return 1;                                                      \
    }                                                                \
  } while (0)

int main(void) {
  size_t count = 0;
  const ultraedit_kernel *kernels = ultraedit_kernels(&count);
  printf("%zu kernels, built from %s\n", count, ultraedit_build());
  EXPECT(count > 0);
  for (size_t i = 0; i < count; i++) {
    const ultraedit_kernel *k = &kernels[i];
    EXPECT(k->code_size > 64 && !memcmp(k->code, "\177ELF", 4));
    EXPECT(k->args_size > 0 && k->args_size % 8 == 0 && k->args_size <= k->params_size);
    EXPECT(k->threads % 32 == 0 && k->threads <= 1024);
    EXPECT(ultraedit_find(k->arch, k->name, k->signature, k->constants) == k);
  }
  EXPECT(ultraedit_find("sm_10", NULL, NULL, NULL) == NULL);
  EXPECT(ultraedit_launch(NULL, 0, 1, 1, 1, NULL, 0, NULL) != NULL);
  EXPECT(strstr(ultraedit_launch(kernels, -1, 1, 1, 1, NULL, 0, NULL), "device is -1"));

  char arch[ULTRAEDIT_ARCH_SIZE];
  const char *error = ultraedit_device_arch(0, arch);
  if (!error) {
    printf("device 0 is %s\n", arch);
    return 0;
  }
  printf("%s\n", error);
  EXPECT(strstr(error, "no GPU driver") || strstr(error, "GPU"));
  char args[4096] = {0};
  error = ultraedit_launch(kernels, 0, 1, 1, 1, args, kernels->args_size, NULL);
  EXPECT(error && strstr(error, "GPU"));
  return 0;
}
