/* python.exe: hands the command line to the python311.dll beside it. */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <stdio.h>

typedef int (*main_function)(int, wchar_t **);

int wmain(int argc, wchar_t **argv)
{
    HMODULE library = LoadLibraryExW(L"python311.dll", NULL, LOAD_WITH_ALTERED_SEARCH_PATH);
    main_function python_main;

    if (!library) {
        fprintf(stderr, "python311.dll cannot be loaded: error %lu\n", GetLastError());
        return 101;
    }
    python_main = (main_function)(void *)GetProcAddress(library, "Py_Main");
    return python_main ? python_main(argc, argv) : 102;
}
