/* A libnvidia-ml.so.1 without a driver: each answer is looked up, when it is asked for, in the
 * environment variable NVML_STUB, "key=value;key=value" (see nvml_stub.py). "!N" answers with
 * the nvmlReturn_t N, and a key that is not there with NVML_ERROR_NOT_SUPPORTED. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
enum { INSTANCE = 1000, SIZE = 256 };

/* Counted for the tests: every call of nvmlInit and nvmlShutdown, failed ones too, and every device
 * handle given out. `running` is the balance of those that succeeded. */
int stub_inits, stub_shutdowns, stub_handles, stub_running;

/* A handle is a pointer that says which device it stands for; an instance of MIG slot s on device
 * d is (s + 1) * INSTANCE + d. */
typedef char *handle;
static char base[INSTANCE * 100];
static int number(handle device) { return (int)(device - base); }

static int look_up(const char *key, char value[SIZE])
{
    const char *all = getenv("NVML_STUB");
    size_t length = strlen(key);
    value[0] = '\0';
    while (all && *all) {
        size_t item = strcspn(all, ";");
        if (item > length && !strncmp(all, key, length) && all[length] == '=') {
            snprintf(value, SIZE, "%.*s", (int)(item - length - 1), all + length + 1);
            return value[0] == '!' ? atoi(value + 1) : OK;
        }
        all += item + (all[item] == ';');
    }
    return NOT_SUPPORTED;
}

static int about(handle device, const char *what, char value[SIZE])
{
    char key[SIZE];
    int slot = number(device) / INSTANCE;
    if (stub_running < 1)
        return UNINITIALIZED;
    if (slot)
        snprintf(key, SIZE, "%d.instance%d.%s", number(device) % INSTANCE, slot - 1, what);
    else
        snprintf(key, SIZE, "%d.%s", number(device), what);
    return look_up(key, value);
}

static int text(int code, const char *value, char *to, unsigned size)
{
    if (code == OK)
        snprintf(to, size, "%s", value);
    return code;
}

int nvmlInitWithFlags(unsigned flags)
{
    char value[SIZE];
    int code = look_up("init", value);
    (void)flags;
    __atomic_add_fetch(&stub_inits, 1, __ATOMIC_SEQ_CST);
    if (code != OK && code != NOT_SUPPORTED)
        return code;
    stub_running++;
    return OK;
}

int nvmlShutdown(void)
{
    char value[SIZE];
    int code = look_up("shutdown", value);
    stub_shutdowns++;
    if (stub_running < 1)
        return UNINITIALIZED;
    stub_running--;
    return code == NOT_SUPPORTED ? OK : code;
}

const char *nvmlErrorString(int code)
{
    static char said[SIZE];
    snprintf(said, SIZE, "stub error %d", code);
    return said;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    char value[SIZE];
    return text(look_up("driver", value), value, version, size);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    char value[SIZE];
    int code = look_up("cuda", value);
    *version = atoi(value);
    return code;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    char value[SIZE];
    int code = stub_running < 1 ? UNINITIALIZED : look_up("count", value);
    *count = code == OK ? (unsigned)atoi(value) : 0;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle *device)
{
    char value[SIZE];
    int code;
    *device = base + index;
    code = about(*device, "handle", value);
    stub_handles++;
    return code == NOT_SUPPORTED ? OK : code;
}

int nvmlDeviceGetName(handle device, char *name, unsigned size)
{
    char value[SIZE];
    return text(about(device, "name", value), value, name, size);
}

int nvmlDeviceGetUUID(handle device, char *uuid, unsigned size)
{
    char value[SIZE];
    return text(about(device, "uuid", value), value, uuid, size);
}

int nvmlDeviceGetCudaComputeCapability(handle device, int *major, int *minor)
{
    char value[SIZE];
    int code = about(device, "capability", value);
    if (code == OK && sscanf(value, "%d.%d", major, minor) != 2)
        return INVALID_ARGUMENT;
    return code;
}

int nvmlDeviceGetMemoryInfo(handle device, unsigned long long memory[3])
{
    char value[SIZE];
    int code = about(device, "memory", value);
    if (code == OK && sscanf(value, "%llu/%llu", &memory[0], &memory[1]) != 2)
        return INVALID_ARGUMENT;
    if (code == OK)
        memory[2] = memory[0] - memory[1];
    return code;
}

int nvmlDeviceGetComputeMode(handle device, int *mode)
{
    char value[SIZE];
    int code = about(device, "compute_mode", value);
    *mode = code == OK ? atoi(value) : 0;
    return code;
}

int nvmlDeviceGetMigMode(handle device, unsigned *current, unsigned *pending)
{
    char value[SIZE];
    int code = about(device, "mig", value);
    *current = *pending = code == OK ? (unsigned)atoi(value) : 0;
    return code;
}

int nvmlDeviceGetMaxMigDeviceCount(handle device, unsigned *count)
{
    char value[SIZE];
    int code = about(device, "mig_slots", value);
    *count = code == OK ? (unsigned)atoi(value) : 0;
    return code;
}

int nvmlDeviceGetMigDeviceHandleByIndex(handle device, unsigned slot, handle *instance)
{
    char value[SIZE];
    int code;
    *instance = device + (slot + 1) * INSTANCE;
    code = about(*instance, "uuid", value);
    return code == NOT_SUPPORTED ? NOT_FOUND : code;
}
