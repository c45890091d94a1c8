/* Walk a bundle: every tensor with dtype, shape and scales, then the checksums of every byte.
 *
 *     cc -std=c99 -O2 -Wall -Wextra -Werror -I tiny-bundle examples/c/walk.c -o walk && ./walk tiny-bundle
 */
#define KINORA_BUNDLE_IMPLEMENTATION
#include "kinora_bundle.h"

#include <stdio.h>

int main(int argc, char **argv) {
    kinora_error error;
    kinora_tensor tensor;
    kinora_bundle *bundle;
    uint32_t number, axis;
    int status = 0;

    if (argc != 2) {
        fprintf(stderr, "usage: walk BUNDLE\n");
        return 2;
    }
    bundle = kinora_bundle_open(argv[1], &error);
    if (!bundle) {
        fprintf(stderr, "walk: %s\n", error.message);
        return 1;
    }
    for (number = 0; number < kinora_bundle_count(bundle); number++) {
        if (kinora_bundle_tensor(bundle, number, &tensor, &error) != KINORA_OK) break;
        printf("%s %s [", tensor.name, kinora_dtype_name(tensor.dtype));
        for (axis = 0; axis < tensor.rank; axis++)
            printf("%s%llu", axis ? ", " : "", (unsigned long long)tensor.shape[axis]);
        printf("] %llu scales\n", (unsigned long long)tensor.scale_count);
    }
    if (kinora_bundle_verify(bundle, &error) != KINORA_OK) {
        fprintf(stderr, "walk: %s\n", error.message);
        status = 1;
    }
    kinora_bundle_close(bundle);
    return status;
}
