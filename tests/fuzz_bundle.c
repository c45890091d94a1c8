/* Opens damaged bundles and uses everything that opens: for AddressSanitizer and UBSan to watch.
 *
 *     fuzz_bundle FOLDER...    prints "status message" for each; exit code 1 when an error came without a message
 *
 * Compiled with -DKINORA_LIBFUZZER -fsanitize=fuzzer (clang) it is a libFuzzer target instead: the input becomes the
 * index, with its checksum made right, beside the weight files in the folder $BUNDLE.
 */
#define KINORA_BUNDLE_IMPLEMENTATION
#include "kinora_bundle.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static volatile unsigned char seen; /* so that reads are not left out */

static void touch(const void *data, uint64_t size) {
    const unsigned char *bytes = (const unsigned char *)data;
    if (size) seen = (unsigned char)(seen ^ bytes[0] ^ bytes[size - 1] ^ bytes[size / 2]);
}

static kinora_status use(const kinora_bundle *bundle, kinora_error *error) {
    kinora_tensor tensor, found;
    uint32_t number;
    for (number = 0; number < kinora_bundle_count(bundle); number++) {
        if (kinora_bundle_tensor(bundle, number, &tensor, error) != KINORA_OK) return error->status;
        touch(tensor.data, tensor.size);
        touch(tensor.scale, tensor.scale_count * sizeof(float));
        if (kinora_bundle_find(bundle, tensor.name, &found, error) != KINORA_OK) return error->status;
        if (found.number != number || found.count * kinora_dtype_size(found.dtype) != found.size) abort();
        if (tensor.rank && tensor.count && tensor.strides[0] * tensor.shape[0] != tensor.count) abort();
    }
    if (kinora_bundle_tensor(bundle, number, &tensor, error) != KINORA_NOT_FOUND) abort();
    if (kinora_bundle_find(bundle, "dit.", &tensor, error) != KINORA_NOT_FOUND) abort();
    return kinora_bundle_verify(bundle, error);
}

static int check(const char *folder, int print) {
    kinora_error error;
    kinora_bundle *bundle = kinora_bundle_open(folder, &error);
    kinora_status status = bundle ? use(bundle, &error) : error.status;
    int told = status == KINORA_OK || (status == error.status && error.message[0]);
    if (!bundle && status == KINORA_OK) told = 0;
    if (print) printf("%d %s\n", (int)status, status == KINORA_OK ? "" : error.message);
    kinora_bundle_close(bundle);
    return told;
}

#if defined(KINORA_LIBFUZZER)
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *folder = getenv("BUNDLE");
    char path[4096];
    uint32_t crc = 0xFFFFFFFFu;
    size_t i;
    int bit;
    FILE *file;
    if (!folder || size < 64 || size > 1u << 16) return 0;
    for (i = 28; i < size; i++)
        for (crc ^= data[i], bit = 0; bit < 8; bit++) crc = crc & 1 ? 0xEDB88320u ^ crc >> 1 : crc >> 1;
    crc = ~crc;
    snprintf(path, sizeof path, "%s/bundle.idx", folder);
    file = fopen(path, "wb");
    if (!file) abort();
    fwrite(data, 1, 24, file);
    for (i = 0; i < 4; i++) fputc((int)(crc >> (8 * i) & 255), file);
    fwrite(data + 28, 1, size - 28, file);
    fclose(file);
    if (!check(folder, 0)) abort();
    return 0;
}
#else
int main(int argc, char **argv) {
    int i, told = 1;
    for (i = 1; i < argc; i++) told &= check(argv[i], 1);
    return !told;
}
#endif
