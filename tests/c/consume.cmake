# Installs the build tree to a folder, moves it, and builds and runs tests/consume with what was installed. STEP: install, make (that
# make install gives the same), cmake or pkgconfig.
cmake_minimum_required(VERSION 3.20)

set(installed ${FOLDER}/moved)

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

if(STEP STREQUAL install)
  file(REMOVE_RECURSE ${FOLDER})
  run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${FOLDER}/installed)
  file(RENAME ${FOLDER}/installed ${installed})
  return()
endif()

if(STEP STREQUAL make)
  # The folders below the prefix are those that CMake chose.
  set(made ${FOLDER}/made)
  file(REMOVE_RECURSE ${made})
  run(make -C ${BUILD_SOURCE} install DESTDIR=${made} PREFIX=/p LIBDIR=${LIBDIR} INCLUDEDIR=${INCLUDEDIR})
  file(GLOB_RECURSE files RELATIVE ${installed} ${installed}/*)
  file(GLOB_RECURSE made_files RELATIVE ${made}/p ${made}/p/*)
  if(NOT files STREQUAL made_files)
    message(SEND_ERROR "cmake installs ${files}\nmake installs ${made_files}")
  endif()
  foreach(file IN LISTS files)
    if(NOT file MATCHES "\\.(a|so|so\\.0)$")
      run(${CMAKE_COMMAND} -E compare_files ${installed}/${file} ${made}/p/${file})
    endif()
  endforeach()
  return()
endif()

# Only ours can be found: no other installation, and not the build tree.
file(GLOB_RECURSE version_file ${installed}/gquant.pc)
get_filename_component(pkgconfig_folder ${version_file} DIRECTORY)
get_filename_component(lib_folder ${pkgconfig_folder} DIRECTORY)

if(STEP STREQUAL cmake)
  set(build ${FOLDER}/cmake)
  file(REMOVE_RECURSE ${build})
  run(${CMAKE_COMMAND} -S ${SOURCE} -B ${build} -DCMAKE_PREFIX_PATH=${installed} -DCMAKE_C_COMPILER=${CC} -DCMAKE_CXX_COMPILER=${CXX})
  run(${CMAKE_COMMAND} --build ${build})
  # Versions that fit, and versions that do not.
  foreach(wanted 99.0 0.0 1.0)
    execute_process(
      COMMAND ${CMAKE_COMMAND} -S ${SOURCE} -B ${build}-${wanted} -DCMAKE_PREFIX_PATH=${installed} -DGQUANT_WANTED=${wanted}
      RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
    if(result EQUAL 0)
      message(SEND_ERROR "find_package(gquant ${wanted}) accepts ${VERSION}")
    endif()
  endforeach()
else()
  set(build ${FOLDER}/pkgconfig)
  file(REMOVE_RECURSE ${build})
  run(${CMAKE_COMMAND} -E env PKG_CONFIG_LIBDIR=${pkgconfig_folder} make -C ${SOURCE} BUILD=${build} CC=${CC} CXX=${CXX})
  execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_LIBDIR=${pkgconfig_folder} pkg-config --modversion gquant
    OUTPUT_VARIABLE version OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  if(NOT version STREQUAL VERSION)
    message(SEND_ERROR "gquant.pc says version ${version}, want ${VERSION}")
  endif()
endif()

foreach(program c_shared c_static cpp_shared cpp_static)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env LD_LIBRARY_PATH=${lib_folder} ${build}/${program}
    OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
  if(NOT output MATCHES "^gquant ${VERSION}: 0\\.[0-9]+ became 0\\.[0-9]+\n$")
    message(SEND_ERROR "${program} printed: ${output}")
  endif()
  execute_process(COMMAND readelf --dynamic ${build}/${program} OUTPUT_VARIABLE dynamic COMMAND_ERROR_IS_FATAL ANY)
  if(program MATCHES shared AND NOT dynamic MATCHES "libgquant\\.so\\.0" OR program MATCHES static AND dynamic MATCHES "libgquant")
    message(SEND_ERROR "${program} is linked to the wrong library: ${dynamic}")
  endif()
endforeach()
